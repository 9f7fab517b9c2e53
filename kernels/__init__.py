"""Fused Triton kernels, each beside its PyTorch reference; installs as ds_stacking.kernels."""
