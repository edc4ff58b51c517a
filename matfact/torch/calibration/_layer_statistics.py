"""What enters one layer: sums over the batches it is fitted to, and over those kept aside."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from matfact import backend
from matfact.calibration import InputStatistics, OutputStatistics
from matfact.torch.layers._matricized import Matricized, as_array

#: One batch in this many is kept aside, beginning with the second.
_PERIOD = 5

#: Of the inputs of a matrix alone, or together with the outputs it has in the dense network.
Sums = InputStatistics | OutputStatistics


def is_aside(index: int) -> bool:
    """Whether the batch with this number is kept aside, to judge fits by.

    Batches as users make them are what is independent of each other, if anything is; the rows of
    one, neighbouring pixels or tokens, are not.
    """
    return index % _PERIOD == 1


@dataclasses.dataclass
class LayerStatistics:
    """Statistics of the inputs of a layer.

    Attributes
    ----------
    fitted : list of InputStatistics or list of OutputStatistics
        One for each matrix of the layer, over the batches it is fitted to. Of pairs of a network
        and the dense one, the inputs are those in the network and the outputs those that the layer
        has in the dense one.
    aside : list of InputStatistics or list of OutputStatistics
        The same for the batches kept aside; nothing is added up where there are none.
    note : str
        What is to be known about them.
    """

    fitted: Sequence[Sums]
    aside: Sequence[Sums]
    note: str = ""

    @classmethod
    def of(cls, view: Matricized, paired: bool) -> LayerStatistics:
        """Return the statistics of nothing."""
        kind: Any = OutputStatistics if paired else InputStatistics
        fitted, aside = ([kind() for _ in view.matrices()] for _ in range(2))
        return cls(fitted, aside)

    def add(self, view: Matricized, x: Tensor, dense: Tensor | None = None, *, aside: bool) -> None:
        """Add what enters the layer, beside what enters it in the dense network for pairs."""
        sums: Any = self.aside if aside else self.fitted
        if dense is None:
            for pieces in view._inputs(x.detach()):
                for running, piece in zip(sums, pieces, strict=True):
                    running.update(as_array(piece))
            return
        matrices = [backend.wide(W) for W in view.arrays()]
        pairs = zip(view._inputs(x.detach()), view._inputs(dense.detach()), strict=True)
        for now, before in pairs:
            for running, W, piece, twin in zip(sums, matrices, now, before, strict=True):
                xp = backend.namespace(W)
                outputs = xp.matmul(backend.wide(as_array(twin)), xp.matrix_transpose(W))
                running.update(as_array(piece), outputs)

    @property
    def count(self) -> int:
        """Number of inputs of each matrix, those kept aside included."""
        return _count(self.fitted[0]) + _count(self.aside[0])

    @property
    def is_empty(self) -> bool:
        """Whether no input has reached the layer in the batches it is fitted to."""
        return all(_count(each) == 0 for each in self.fitted)

    def by_matrix(self) -> list[tuple[Sums, Sums | None]]:
        """Return the statistics of each matrix, those of batches kept aside if there are any."""
        pairs = zip(self.fitted, self.aside, strict=True)
        return [(fitted, aside if _count(aside) else None) for fitted, aside in pairs]


def _count(sums: Sums) -> int:
    return sums.count if isinstance(sums, InputStatistics) else sums.inputs.count
