"""Dequantises nothing."""
