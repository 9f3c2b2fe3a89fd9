"""Kernels in Triton for NVIDIA GPUs; importing this needs triton, which torch brings along on Linux."""
