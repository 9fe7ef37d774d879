"""One pass a file; their order stands in compile/pipeline.py."""
