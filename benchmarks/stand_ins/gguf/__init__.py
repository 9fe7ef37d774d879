"""Stands in for the gguf package where that is missing, so that modules which name its types can be imported. No file can be read."""
