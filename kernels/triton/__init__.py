"""Kernels in Triton for CUDA devices; under TRITON_INTERPRET=1 they run on the CPU, slowly, for tests."""
