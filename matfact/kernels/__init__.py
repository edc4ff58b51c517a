"""Hot loops, with a plain Array API version beside each."""

from matfact.kernels.consensus import absorb_step, consensus_target
from matfact.kernels.selection import top_k_mask

__all__ = ["absorb_step", "consensus_target", "top_k_mask"]
