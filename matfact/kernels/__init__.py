"""Compiled hot loops, each with a plain Array API version."""

from matfact.kernels.consensus import absorb_step, consensus_target
from matfact.kernels.flips import absorb_signs, flip_in_metric, flip_rows, sign_target
from matfact.kernels.products import normal_equations, supported_inner
from matfact.kernels.selection import top_k_mask

__all__ = [
    "absorb_signs",
    "absorb_step",
    "consensus_target",
    "flip_in_metric",
    "flip_rows",
    "normal_equations",
    "sign_target",
    "supported_inner",
    "top_k_mask",
]
