"""Triton kernels for factors on CUDA, as operators of torch, and the rule that chooses them."""
