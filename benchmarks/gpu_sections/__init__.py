"""The sections of gpu_suite.py, one module each."""
