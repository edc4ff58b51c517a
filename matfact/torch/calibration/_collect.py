"""Statistics of the layers of a block that its batches call next."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration._layer_statistics import LayerStatistics, is_aside
from matfact.torch.calibration._passes import Stopped
from matfact.torch.calibration.statistics import naming, rows_of
from matfact.torch.layers._matricized import Matricized

#: A tensor and the number of its changes in place, None where that is not counted.
_State = tuple[Tensor, int | None]
_Mode = Callable[[], contextlib.AbstractContextManager[None]]

#: Least correlation of inputs with their counterparts in the dense network.
LEAST_CORRELATION = 0.5
_UNLIKE = "its inputs have no counterparts in the dense network: fitted without feedback"


@dataclasses.dataclass(frozen=True, eq=False)
class Arrived:
    """A batch that is where layers are called next.

    Attributes
    ----------
    index : int
        Its number.
    calls : Counter of str
        How often it calls each layer in the dense network.
    own : Pass or WholePass
        In the network as it is now.
    dense : Pass, WholePass or None
        In the dense network, if that is wanted.
    """

    index: int
    calls: Counter[str]
    own: Any
    dense: Any


class Collected:
    """The first layer of a block that is called, and those that are given the same inputs.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    views : dict of str to Matricized
        Layers of the block.
    arrived : list of Arrived
        Batches that wait before the block.
    as_dense : callable
        Returns a context in which the network has the layers of the dense one.

    Attributes
    ----------
    statistics : dict of str to LayerStatistics
        Those of the inputs of each; none where no batch calls a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        views: dict[str, Matricized],
        arrived: Sequence[Arrived],
        as_dense: _Mode,
    ) -> None:
        self._model, self._views, self._as_dense = model, views, as_dense
        self.statistics: dict[str, LayerStatistics] = {}
        called = (self._first_called(each.own) for each in arrived)
        first = next((name for name in called if name is not None), None)
        if first is None:
            return
        self._first, self._started = first, -1
        paired = [each.dense is not None for each in arrived]
        if any(paired) and not (all(paired) and self._add_pairs(arrived)):
            self._add_alone(arrived)
            for statistics in self.statistics.values():
                statistics.note = _UNLIKE
        elif not any(paired):
            self._add_alone(arrived)

    def _first_called(self, own: Any) -> str | None:
        """Return the layer that a batch calls first."""
        found: list[str] = []

        def visit(name: str, x: Tensor) -> None:
            found.append(name)
            raise Stopped

        own.visit(self._views, visit)
        return found[0] if found else None

    def _add_alone(self, arrived: Sequence[Arrived]) -> None:
        self.statistics = {}
        for each in arrived:
            self._add(each, None)

    def _add_pairs(self, arrived: Sequence[Arrived]) -> bool:
        """Add pairs of inputs now and in the dense network; return whether they belong together."""
        likeness = _Likeness()
        for each in arrived:
            dense = self._dense_inputs(each)
            if dense is None or not self._add(each, dense, likeness):
                return False
        return likeness.is_given

    def _dense_inputs(self, batch: Arrived) -> list[Tensor] | None:
        """Return what all calls of the layer are given in the dense network, None if unknown."""
        found: list[Tensor] = []
        wanted = batch.calls[self._first]
        if batch.dense is None or batch.dense.at != batch.own.at:
            return None

        def visit(name: str, x: Tensor) -> None:
            if name == self._first:
                found.append(x if wanted == 1 else x.clone())  # which later code may write to
                if len(found) == wanted:
                    raise Stopped

        with self._as_dense():
            batch.dense.visit(self._views, visit)
        return found

    def _add(
        self, batch: Arrived, dense: list[Tensor] | None, likeness: _Likeness | None = None
    ) -> bool:
        """Add what one batch brings; return whether it fits what it has in the dense network."""
        entered: dict[str, _State] = {}
        expected = set(self.statistics or self._views)
        wanted, n_calls, fits = batch.calls[self._first], 0, True

        def visit(name: str, x: Tensor) -> None:
            nonlocal n_calls, fits
            state = x, None if x.is_inference() else x._version
            if name == self._first:
                twin = None if dense is None else dense[n_calls] if n_calls < len(dense) else x
                fits = twin is None or _shape(twin) == _shape(x)
                if not fits:
                    raise Stopped
                n_calls += 1
                entered[name] = state
                self._count(batch, name, x, twin, likeness)
            elif entered and wanted == 1:
                if not (batch.calls[name] == 1 and self._shares(name, state, entered[self._first])):
                    raise Stopped
                entered[name] = state
                self._count(batch, name, x, dense[0] if dense else None, None)
            if n_calls >= wanted and (wanted > 1 or entered.keys() >= expected):
                raise Stopped

        batch.own.visit(self._views, visit)
        if entered:
            kept = {name: each for name, each in self.statistics.items() if name in entered}
            self.statistics = kept
        return fits and (dense is None or n_calls == len(dense))

    def _shares(self, name: str, state: _State, entered: _State) -> bool:
        """Whether a layer is given what the first one was, as query, key and value are."""
        (x, version), (y, before) = state, entered
        by_rows = all(self._views[each].by_rows for each in (name, self._first))
        return by_rows and x is y and version is not None and version == before

    def _count(
        self, batch: Arrived, name: str, x: Tensor, twin: Tensor | None, likeness: _Likeness | None
    ) -> None:
        view = self._views[name]
        if name not in self.statistics:
            if name != self._first and batch.index != self._started:
                return  # an earlier batch has not given it the same
            self._started = batch.index
            self.statistics[name] = LayerStatistics.of(view, paired=twin is not None)
        x = rows_of(view, x, batch.own.batch, self._model)
        if twin is not None:
            twin = rows_of(view, twin, batch.own.batch, self._model)
            if likeness is not None:
                likeness.add(x, twin, axis=-1 if view.by_rows else 1)
        with naming(name, batch.index):
            self.statistics[name].add(view, x, twin, aside=is_aside(batch.index))


class _Likeness:
    """How much inputs vary with their counterparts in the dense network.

    Wrong counterparts, such as other tokens that a router sent there, tell nothing of them.
    """

    def __init__(self) -> None:
        self._count, self._products = 0, torch.zeros(3, dtype=torch.float64)
        self._sums: Any = 0.0

    def add(self, x: Tensor, dense: Tensor, axis: int) -> None:
        rows = torch.stack([
            each.detach().movedim(axis if each.ndim > 2 else -1, -1).flatten(0, -2).double().cpu()
            for each in (x, dense)
        ])  # fmt: skip
        self._count += rows.shape[1]
        # Not in place: the network may be in inference mode here, or its caller.
        self._products = self._products + _products(rows)
        self._sums = self._sums + rows.sum(1)

    @property
    def is_given(self) -> bool:
        """Whether they do; if one of them does not vary at all, there is nothing to tell."""
        if not self._count:
            return True
        about_mean = self._products - self._count * _products(self._sums[:, None] / self._count)
        varies = about_mean > 1e-12 * self._products
        both, own, dense = about_mean.tolist()
        return not bool(varies[1:].all()) or both > LEAST_CORRELATION * math.sqrt(own * dense)


def _products(rows: Tensor) -> Tensor:
    """Return the inner products of inputs with counterparts, with themselves, and of those."""
    x, dense = rows
    return torch.stack([(x * dense).sum(), (x * x).sum(), (dense * dense).sum()])


def _shape(x: Tensor) -> Any:
    return [tuple(each.shape) for each in x.unbind()] if x.is_nested else x.shape
