"""Dense products of Kronecker-sparse factors."""

from __future__ import annotations

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.kernels.compilation import compiled

#: Terms of a sum from which batched matrix products are faster.
_LONG = 16


def merge(left: Array, right: Array) -> Array:
    """Return the blocks of the product of a Kronecker-sparse and a block-diagonal matrix.

    Parameters
    ----------
    left : array of shape (a, d, b, c)
        Values of the first factor.
    right : array of shape (a · radix, c · d / radix, width)
        Blocks of the second, where `radix` divides c.

    Returns
    -------
    array of shape (a, b · d, radix · width)
        Blocks of the product.
    """
    a, d, b, c = left.shape
    n_blocks, _, width = right.shape
    radix = n_blocks // a
    xp = backend.namespace(left)
    if backend.is_numpy(left) and left.dtype == right.dtype and c // radix < _LONG:
        out = np.empty((a, b * d, radix * width), left.dtype)
        _merge(left, right, out)
        return out
    left = xp.reshape(left, (a, d, b, radix, c // radix))
    right = xp.reshape(right, (a, radix, c // radix, d, width))
    product = xp.matmul(
        xp.permute_dims(left, (0, 3, 1, 2, 4)), xp.permute_dims(right, (0, 1, 3, 2, 4))
    )
    return xp.reshape(xp.permute_dims(product, (0, 3, 2, 1, 4)), (a, b * d, radix * width))


@compiled()
def _merge(left, right, out):  # type: ignore[no-untyped-def]
    a, d, b, c = left.shape
    n_blocks, _, width = right.shape
    terms = c * a // n_blocks
    for block in range(n_blocks):
        i, g = block * a // n_blocks, block % (n_blocks // a)
        for k in range(d):
            for j in range(b):
                total = out[i, j * d + k, g * width : (g + 1) * width]
                scale, row = left[i, k, j, g * terms], right[block, k]
                for t in range(width):
                    total[t] = scale * row[t]
                for s in range(1, terms):
                    scale, row = left[i, k, j, g * terms + s], right[block, s * d + k]
                    for t in range(width):
                        total[t] += scale * row[t]
