"""Correctness and speed of the kernels on a GPU, beside their peers: `python -m benchmarks.gpu_check`."""
