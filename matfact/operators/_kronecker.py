"""Kronecker-sparse factors: butterfly, Monarch and equal block-diagonal matrices."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from matfact import backend
from matfact.backend import Array
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KroneckerSparseFactor(Factor):
    """Matrix with support ``I_a ⊗ 1_{b×c} ⊗ I_d``.

    For d = 1 it is block-diagonal with `a` blocks of b×c; (a, 2, 2, d) is a butterfly factor of
    size 2·a·d with blocks of size 2·d (Zhang, Definitions 1 and 2).

    Parameters
    ----------
    values : array of shape (a, d, b, c)
        ``values[i, l, j, k]`` is at row (i, j, l) of (a, b, d) and column (i, k, l) of (a, c, d),
        both in C order.
    """

    kind: ClassVar[str] = "kronecker"

    @property
    def pattern(self) -> tuple[int, int, int, int]:
        """The integers (a, b, c, d) of the support."""
        a, d, b, c = self.values.shape
        return (a, b, c, d)

    @property
    def shape(self) -> tuple[int, int]:
        a, b, c, d = self.pattern
        return (a * b * d, a * c * d)

    @property
    def T(self) -> KroneckerSparseFactor:  # noqa: N802
        return KroneckerSparseFactor(backend.namespace(self.values).matrix_transpose(self.values))

    def apply(self, X: Array) -> Array:
        a, b, c, d = self.pattern
        xp = backend.namespace(X)
        blocks = xp.permute_dims(xp.reshape(X, (a, c, d, -1)), (0, 2, 1, 3))
        product = xp.matmul(backend.compute_array(self.values), blocks)
        return xp.reshape(xp.permute_dims(product, (0, 2, 1, 3)), (a * b * d, -1))

    def merged(self, other: KroneckerSparseFactor) -> KroneckerSparseFactor | None:
        """Return the product with a block-diagonal `other`, if the product is block-diagonal too.

        It has as many blocks as this factor's outer digit, so multiplying a chain from the right
        takes O(n²) operations in total.
        """
        a, _, c, _ = self.pattern
        n_blocks, _, _, other_d = other.pattern
        radix = n_blocks // a
        if other_d != 1 or n_blocks % a or c % radix:
            return None
        from matfact.kernels.chains import merge  # loads Numba only if needed

        right = backend.compute_array(other.values)[:, 0, :, :]
        product = merge(backend.compute_array(self.values), right)
        return KroneckerSparseFactor(product[:, None, :, :])

    def suits_bytes(self) -> bool:
        return self.values.shape[2:] == (1, 1)

    def add_to(self, program: Program) -> None:
        if program.stored == "int8":
            program.add_scales(self.values)
        else:
            program.add_kronecker(self.values)

    def toarray(self) -> Array:
        a, b, c, d = self.pattern
        if a == d == 1:
            return self.values[0, 0, :, :]
        xp = backend.namespace(self.values)
        device, dtype = backend.device(self.values), self.values.dtype
        outer = xp.reshape(xp.eye(a, dtype=dtype, device=device), (a, 1, 1, a, 1, 1))
        inner = xp.reshape(xp.eye(d, dtype=dtype, device=device), (1, 1, d, 1, 1, d))
        blocks = xp.reshape(xp.permute_dims(self.values, (0, 2, 1, 3)), (a, b, d, 1, c, 1))
        return xp.reshape(blocks * outer * inner, self.shape)


def merged(left: Factor, right: Factor) -> Factor | None:
    """Return the product of two neighbours if it is block-diagonal."""
    if isinstance(left, KroneckerSparseFactor) and isinstance(right, KroneckerSparseFactor):
        return left.merged(right)
    return None
