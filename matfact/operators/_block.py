"""Factor with dense rectangular blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from matfact import backend
from matfact.backend import Array
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matfact.operators._dispatch.program import Program


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockSparseFactor(Factor):
    """Sparse matrix of dense, non-overlapping blocks of any size and position.

    Parameters
    ----------
    values : array of shape (nnz,)
        Values of the blocks, block after block, each in C order.
    blocks : ndarray of shape (n_blocks, 4)
        First row, end row, first column and end column of each block (ends are exclusive).
    dimensions : ndarray of shape (2,)
        Rows and columns of the matrix.
    """

    blocks: np.ndarray
    dimensions: np.ndarray

    kind: ClassVar[str] = "blocks"

    @classmethod
    def from_blocks(
        cls,
        arrays: list[Array],
        corners: list[tuple[int, int]],
        shape: tuple[int, int],
        like: Array,
    ) -> BlockSparseFactor:
        """Place each of `arrays` at the matching (row, column) of `corners`.

        `like` gives the library, device and dtype if there are no blocks.
        """
        xp = backend.namespace(like)
        flat = [xp.reshape(array, (-1,)) for array in arrays]
        empty = xp.zeros(0, dtype=like.dtype, device=backend.device(like))
        spans = [
            (row, row + array.shape[0], column, column + array.shape[1])
            for array, (row, column) in zip(arrays, corners, strict=True)
        ]
        return cls(
            xp.concat(flat) if flat else empty,
            np.asarray(spans, dtype=np.int64).reshape(-1, 4),
            np.asarray(shape, dtype=np.int64),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (int(self.dimensions[0]), int(self.dimensions[1]))

    @property
    def T(self) -> BlockSparseFactor:  # noqa: N802
        xp = backend.namespace(self.values)
        return BlockSparseFactor.from_blocks(
            [xp.matrix_transpose(block) for _, block in self._placed(self.values)],
            [(int(span[2]), int(span[0])) for span in self.blocks],
            (self.shape[1], self.shape[0]),
            like=self.values,
        )

    def _placed(self, values: Array) -> list[tuple[np.ndarray, Array]]:
        """Return the position of each block with its values as a matrix."""
        xp = backend.namespace(values)
        heights = self.blocks[:, 1] - self.blocks[:, 0]
        widths = self.blocks[:, 3] - self.blocks[:, 2]
        ends = np.cumsum(heights * widths)
        return [
            (span, xp.reshape(values[int(end - h * w) : int(end)], (int(h), int(w))))
            for span, h, w, end in zip(self.blocks, heights, widths, ends, strict=True)
        ]

    def apply(self, X: Array) -> Array:
        xp = backend.namespace(X)
        values = backend.compute_array(self.values)
        dtype = xp.result_type(values.dtype, X.dtype)
        out = xp.zeros((self.shape[0], X.shape[1]), dtype=dtype, device=backend.device(X))
        for (r0, r1, c0, c1), block in self._placed(values):
            out[r0:r1, :] += xp.matmul(block, X[c0:c1, :])
        return out

    def add_to(self, program: Program) -> None:
        program.add_blocks(self.values, self.blocks, self.shape[0])

    def toarray(self) -> Array:
        xp = backend.namespace(self.values)
        out = xp.zeros(self.shape, dtype=self.values.dtype, device=backend.device(self.values))
        for (r0, r1, c0, c1), block in self._placed(self.values):
            out[r0:r1, c0:c1] = block
        return out

    def index_nbytes(self, format: str) -> int:
        return 4 * self.blocks.size
