"""Weights: their formats, the readers of checkpoints, and the loader that fills a model."""
