"""Statistics of one layer's inputs, over fitted and held-out batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from matfact import backend
from matfact.calibration import InputStatistics, OutputStatistics
from matfact.torch.layers._matricized import Matricized, as_array

#: One batch in this many is held out, beginning with the second.
_PERIOD = 5

#: Statistics of a matrix's inputs, alone or with its outputs in the dense network.
Sums = InputStatistics | OutputStatistics


def is_aside(index: int) -> bool:
    """Whether the batch with this number is held out to judge fits.

    Whole batches are held out, since rows within a batch, such as neighbouring pixels or tokens,
    are not independent.
    """
    return index % _PERIOD == 1


@dataclasses.dataclass
class LayerStatistics:
    """Statistics of the inputs of a layer.

    Attributes
    ----------
    fitted : list of InputStatistics or list of OutputStatistics
        One per matrix of the layer, over the fitted batches. With pairs, inputs are those in the
        current network and outputs those of the layer in the dense network.
    aside : list of InputStatistics or list of OutputStatistics
        The same for held-out batches; empty without held-out batches.
    note : str
        A remark.
    """

    fitted: Sequence[Sums]
    aside: Sequence[Sums]
    note: str = ""

    @classmethod
    def of(cls, view: Matricized, paired: bool) -> LayerStatistics:
        """Return empty statistics."""
        kind: Any = OutputStatistics if paired else InputStatistics
        fitted, aside = ([kind() for _ in view.matrices()] for _ in range(2))
        return cls(fitted, aside)

    def add(self, view: Matricized, x: Tensor, dense: Tensor | None = None, *, aside: bool) -> None:
        """Add inputs of the layer and, for pairs, its inputs in the dense network."""
        sums: Any = self.aside if aside else self.fitted
        if dense is None:
            for pieces in view._inputs(x.detach()):
                for running, piece in zip(sums, pieces, strict=True):
                    running.update(as_array(piece))
            return
        matrices = [backend.wide(W) for W in view.arrays()]
        pairs = zip(view._inputs(x.detach()), view._inputs(dense.detach()), strict=True)
        for now, before in pairs:
            for running, W, piece, counterpart in zip(sums, matrices, now, before, strict=True):
                xp = backend.namespace(W)
                outputs = xp.matmul(backend.wide(as_array(counterpart)), xp.matrix_transpose(W))
                running.update(as_array(piece), outputs)

    @property
    def count(self) -> int:
        """Number of inputs of each matrix, including held-out ones."""
        return _count(self.fitted[0]) + _count(self.aside[0])

    @property
    def is_empty(self) -> bool:
        """Whether no fitted batch has reached the layer."""
        return all(_count(each) == 0 for each in self.fitted)

    def by_matrix(self) -> list[tuple[Sums, Sums | None]]:
        """Return the fitted and, if any, held-out statistics of each matrix."""
        pairs = zip(self.fitted, self.aside, strict=True)
        return [(fitted, aside if _count(aside) else None) for fitted, aside in pairs]


def _count(sums: Sums) -> int:
    return sums.count if isinstance(sums, InputStatistics) else sums.inputs.count
