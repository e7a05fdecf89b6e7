"""Triton kernels for CUDA devices. Imported with the first call that runs on one, never before."""
