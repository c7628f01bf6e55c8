"""The CUDA backend: CUDA C++ kernels, compiled at first use."""
