"""Statistics of the layers that the batches in a block call next."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration._layer_statistics import LayerStatistics, is_aside
from matfact.torch.calibration._passes import Stopped
from matfact.torch.calibration.statistics import naming, rows_of
from matfact.torch.layers._matricized import Matricized

#: A tensor and its version, None if torch does not track it.
_State = tuple[Tensor, int | None]
_Mode = Callable[[], contextlib.AbstractContextManager[None]]

#: Minimum correlation of inputs with their counterparts in the dense network.
LEAST_CORRELATION = 0.5
_UNLIKE = "its inputs have no counterparts in the dense network: fitted without feedback"


@dataclasses.dataclass(frozen=True, eq=False)
class Arrived:
    """A batch waiting before the next layers.

    Attributes
    ----------
    index : int
        Number of the batch.
    calls : Counter of str
        Number of calls of each layer in the dense network.
    own : Pass or WholePass
        Pass through the network in its current state.
    dense : Pass, WholePass or None
        Pass through the dense network, if needed.
    """

    index: int
    calls: Counter[str]
    own: Any
    dense: Any


class Collected:
    """Collects statistics of the next layer of a block and of others with the same inputs.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    views : dict of str to Matricized
        Layers of the block.
    arrived : list of Arrived
        Batches waiting before the block.
    as_dense : callable
        Returns a context in which the network has its dense layers.
    known : collection of str
        Layers whose statistics are not needed, and stay empty.

    Attributes
    ----------
    statistics : dict of str to LayerStatistics
        Statistics of the inputs of each layer; empty if no batch calls a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        views: dict[str, Matricized],
        arrived: Sequence[Arrived],
        as_dense: _Mode,
        known: Collection[str] = (),
    ) -> None:
        self._model, self._views, self._as_dense = model, views, as_dense
        self.statistics: dict[str, LayerStatistics] = {}
        called = (self._first_called(each.own) for each in arrived)
        first = next((name for name in called if name is not None), None)
        if first is None:
            return
        self._first, self._started = first, -1
        if first in known:
            self.statistics = {first: LayerStatistics.of(views[first], paired=False)}
            return
        paired = [each.dense is not None for each in arrived]
        if any(paired) and not (all(paired) and self._add_pairs(arrived)):
            self._add_alone(arrived)
            for statistics in self.statistics.values():
                statistics.note = _UNLIKE
        elif not any(paired):
            self._add_alone(arrived)

    def _first_called(self, own: Any) -> str | None:
        """Return the first layer called by a batch."""
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
        """Add pairs of current and dense inputs; return whether they correspond."""
        likeness = _Likeness()
        for each in arrived:
            dense = self._dense_inputs(each)
            if dense is None or not self._add(each, dense, likeness):
                return False
        return likeness.is_given

    def _dense_inputs(self, batch: Arrived) -> list[Tensor] | None:
        """Return the inputs of all calls of the layer in the dense network, or None if unknown."""
        found: list[Tensor] = []
        wanted = batch.calls[self._first]
        if batch.dense is None or batch.dense.at != batch.own.at:
            return None

        def visit(name: str, x: Tensor) -> None:
            if name == self._first:
                found.append(x if wanted == 1 else x.clone())  # later code may modify it
                if len(found) == wanted:
                    raise Stopped

        with self._as_dense():
            batch.dense.visit(self._views, visit)
        return found

    def _add(
        self, batch: Arrived, dense: list[Tensor] | None, likeness: _Likeness | None = None
    ) -> bool:
        """Add the inputs of one batch; return whether they correspond to the dense ones."""
        entered: dict[str, _State] = {}
        expected = set(self.statistics or self._views)
        wanted, n_calls, fits = batch.calls[self._first], 0, True

        def visit(name: str, x: Tensor) -> None:
            nonlocal n_calls, fits
            state = x, None if x.is_inference() else x._version
            if name == self._first:
                counterpart = (
                    None if dense is None else dense[n_calls] if n_calls < len(dense) else x
                )
                fits = counterpart is None or _shape(counterpart) == _shape(x)
                if not fits:
                    raise Stopped
                n_calls += 1
                entered[name] = state
                self._count(batch, name, x, counterpart, likeness)
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
        """Whether a layer has the same inputs as the first one, like query, key and value."""
        (x, version), (y, before) = state, entered
        by_rows = all(self._views[each].by_rows for each in (name, self._first))
        return by_rows and x is y and version is not None and version == before

    def _count(
        self,
        batch: Arrived,
        name: str,
        x: Tensor,
        counterpart: Tensor | None,
        likeness: _Likeness | None,
    ) -> None:
        view = self._views[name]
        if name not in self.statistics:
            if name != self._first and batch.index != self._started:
                return  # its inputs differed in an earlier batch
            self._started = batch.index
            self.statistics[name] = LayerStatistics.of(view, paired=counterpart is not None)
        x = rows_of(view, x, batch.own.batch, self._model)
        if counterpart is not None:
            counterpart = rows_of(view, counterpart, batch.own.batch, self._model)
            if likeness is not None:
                likeness.add(x, counterpart, axis=-1 if view.by_rows else 1)
        with naming(name, batch.index):
            self.statistics[name].add(view, x, counterpart, aside=is_aside(batch.index))


class _Likeness:
    """Correlation of inputs with their counterparts in the dense network.

    It reveals wrong counterparts, such as other tokens sent by a router.
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
        # Not in place: inference mode may be on.
        self._products = self._products + _products(rows)
        self._sums = self._sums + rows.sum(1)

    @property
    def is_given(self) -> bool:
        """Whether inputs are correlated; true if one of them is constant."""
        if not self._count:
            return True
        about_mean = self._products - self._count * _products(self._sums[:, None] / self._count)
        varies = about_mean > 1e-12 * self._products
        both, own, dense = about_mean.tolist()
        return not bool(varies[1:].all()) or both > LEAST_CORRELATION * math.sqrt(own * dense)


def _products(rows: Tensor) -> Tensor:
    """Return inner products: inputs with counterparts, inputs, and counterparts."""
    x, dense = rows
    return torch.stack([(x * dense).sum(), (x * x).sum(), (dense * dense).sum()])


def _shape(x: Tensor) -> Any:
    return [tuple(each.shape) for each in x.unbind()] if x.is_nested else x.shape
