"""Compiled hot loops, each with a plain Array API version."""

from matfact.kernels.consensus import absorb_step, consensus_target
from matfact.kernels.products import normal_equations, supported_inner
from matfact.kernels.selection import top_k_mask

__all__ = [
    "absorb_step",
    "consensus_target",
    "normal_equations",
    "supported_inner",
    "top_k_mask",
]
