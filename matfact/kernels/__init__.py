"""Hot loops, with a plain Array API version beside each."""

from matfact.kernels.selection import top_k_mask

__all__ = ["top_k_mask"]
