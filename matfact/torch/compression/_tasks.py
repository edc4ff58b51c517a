"""Selection of layers to compress, and how to compress each."""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from sklearn.base import clone
from torch import nn
from torch.nn.parameter import is_lazy

from matfact import metrics
from matfact._layers import NOT_FINITE, reason_to_keep
from matfact.backend import Array
from matfact.factorizers import METHODS, BaseFactorizer
from matfact.factorizers._settings import (
    check_value_bits,
    configured,
    density_of,
    has_bits,
    has_density,
    name_of,
)
from matfact.report import LayerReport
from matfact.torch._warnings import CompressionWarning
from matfact.torch.compression._fit import Fitted
from matfact.torch.layers._matricized import (
    Dimensions,
    Matricized,
    dimensions,
    distinct_layers,
    facts,
    is_linear,
    matricized,
)
from matfact.torch.layers._weights import is_finite, place, tied_places
from matfact.torch.running._offloaded import fetched
from matfact.torch.running._traces import OF_ALL_MODULES

#: Message of layers that are kept on request.
AS_REQUESTED = "as requested"
#: A factorizer, or its name in `matfact.factorizers.METHODS`.
Method = str | BaseFactorizer
#: Selection of layers: a regular expression, names, or a function of name and module.
Layers = str | Collection[str] | Callable[[str, nn.Module], bool]
#: Positions of layers to keep.
Position = Literal["first", "last"]
#: Override for a layer: a method, a density, both, both with bits, or None to keep it.
Override = Method | float | tuple[Method, float] | tuple[Method, float | None, float | None] | None


@dataclasses.dataclass
class Task:
    """A layer and how to compress it.

    Attributes
    ----------
    names : list of str
        All names of the layer in the network.
    kind : str
        Its class.
    dimensions : Dimensions
        Dimensions of its matrices.
    view : Matricized or None
        Matrix view of the layer; None if it is not supported.
    factorizer : BaseFactorizer or None
        Unfitted estimator; None if the layer is kept.
    message : str
        Why it is kept, or a remark.
    is_given : bool
        Whether it has an override.
    """

    names: list[str]
    kind: str
    dimensions: Dimensions
    view: Matricized | None
    factorizer: BaseFactorizer | None
    message: str = ""
    is_given: bool = False

    def keep(self, message: str) -> None:
        """Keep the layer, with a reason."""
        self.factorizer, self.message = None, message

    def problem(self) -> tuple[BaseFactorizer, list[Array], bool]:
        """Return the factorizer, the matrices, and whether the layer has a bias."""
        assert self.factorizer is not None
        assert self.view is not None
        layer: Any = self.view.layer
        return self.factorizer, self.view.arrays(), layer.bias is not None

    def work(self, with_inputs: bool) -> tuple[str, float]:
        """Return the method and a number in proportion to the FLOPs of its fits."""
        assert self.factorizer is not None
        rows, columns, groups, _ = self.dimensions
        work = groups * self.factorizer.fit_work(rows, columns, with_inputs=with_inputs)
        return name_of(self.factorizer), work

    def report(self, status: str, fitted: Fitted | None = None) -> LayerReport:
        """Return the row of the report."""
        rows, columns, groups, itemsize = self.dimensions
        size = self.dimensions.size
        row = LayerReport(
            layer=self.names[0],
            kind=self.kind,
            rows=rows,
            columns=columns,
            groups=groups,
            method="" if status == "kept" or self.factorizer is None else name_of(self.factorizer),
            status=status,
            dense_nbytes=size * itemsize,
            dense_flops=2 * size,
            requested_density=density_of(self.factorizer),
            message=self.message,
        )
        return row if fitted is None else dataclasses.replace(row, **_measures(fitted, row))


def _measures(fitted: Fitted, row: LayerReport) -> dict[str, Any]:
    products = fitted.products
    size = row.dense_flops // 2
    nbytes = fitted.nbytes(row.dense_nbytes // size)
    return {
        "density": sum(product.nnz for product in products) / size,
        "relative_error": fitted.relative_error,
        "normalized_error": fitted.normalized_error,
        "layer_error": fitted.layer_error,
        "fitted_layer_error": fitted.fitted_layer_error,
        "nbytes": nbytes,
        "bits_per_weight": 8 * nbytes / size,
        "flops": sum(product.flops for product in products),
        "seconds": fitted.seconds,
    }


def plan(
    model: nn.Module,
    method: Method,
    density: float | None,
    layers: Layers | None,
    overrides: Mapping[str, Override],
    keep: Sequence[Position] = (),
    value_bits: int | None = None,
) -> list[Task]:
    """Return a task for each selected layer, in the order of the network.

    Factorizers get `value_bits`, except those of overrides that have bits of their own.

    Raises
    ------
    ValueError
        If a parameter is invalid or matches no layer, if no layer is selected, or if the weight of
        a layer to compress is not in memory.
    """
    metrics.check_density(density)
    check_value_bits(value_bits)
    found = [(names, layer) for names, layer in distinct_layers(model) if is_linear(layer)]
    check_names(layers, overrides, [name for names, _ in found for name in names])
    tied, holders = tied_places(model), _holders(model)
    tasks = []
    for names, layer in found:
        factorizer = _factorizer(names, method, density, value_bits, overrides)
        if any(is_selected(name, layer, layers) for name in names):
            tasks.append(_task(names, layer, factorizer, _shared(layer, tied), holders.get(layer)))
    if not tasks:
        raise ValueError(f"layers must select linear layers or convolutions, got {layers!r}.")
    for task in tasks:
        task.is_given = bool(_matching(task.names, overrides))
    for position, task in zip(get_args(Position), (tasks[0], tasks[-1]), strict=True):
        if position in keep:
            task.keep(AS_REQUESTED)
    for task in tasks:
        _check_values(task)
    return tasks


def _task(
    names: list[str],
    layer: nn.Module,
    factorizer: BaseFactorizer | None,
    shared: Mapping[str, str],
    holder: str | None,
) -> Task:
    stored: Any = layer._parameters.get("weight")
    if is_lazy(stored):
        raise ValueError(
            f"model must be initialized, but {names[0]!r} is a {type(layer).__name__} that has "
            "never been called: call the network once before."
        )
    task = Task(names, type(layer).__name__, dimensions(layer), matricized(layer), factorizer)
    known = facts(layer)
    if holder is not None and known.odd is None:
        known = known._replace(odd=f"layer that {holder} also holds, where it cannot be replaced")
    if (reason := reason_to_keep(known._replace(shared=shared))) is not None:
        task.keep(reason)
    elif factorizer is None:
        task.keep(AS_REQUESTED)
    return task


def _shared(layer: nn.Module, tied: Mapping[Any, Mapping[nn.Module, str]]) -> dict[str, str]:
    """Return the shared parameters of a layer, with a name of each in another module."""
    return {
        "weight" if own.startswith("weight") else own: min(
            name for module, name in tied[place(parameter)].items() if module is not layer
        )
        for own, parameter in layer.named_parameters()
        if place(parameter) in tied
    }


def _holders(model: nn.Module) -> dict[Any, str]:
    """Return layers that are also plain attributes, through which they may still be called."""
    holders: dict[Any, str] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in OF_ALL_MODULES:
                continue
            held = value.values() if isinstance(value, dict) else value
            several = held if isinstance(value, (dict, list, tuple, set)) else [value]
            for each in several:
                if isinstance(each, nn.Module):
                    holders[each] = f"{name}.{attribute}".strip(".")
    return holders


def _check_values(task: Task) -> None:
    """Raise ``ValueError`` for weights not in memory, and keep layers with non-finite weights."""
    if task.view is None or task.factorizer is None:
        return
    name = task.names[0]
    with fetched(task.view.layer):
        weight = task.view.weight
        if weight.is_meta:
            raise ValueError(
                f"model must have the weights to compress in memory, or offloaded by accelerate, "
                f"but the weight of {name!r} is on the meta device: never loaded. Load it, or "
                "exclude the layer with layers or overrides."
            )
        has_numbers = is_finite(weight)
    if not has_numbers:
        task.keep(NOT_FINITE)
        warnings.warn(f"{name} is kept: {task.message}.", CompressionWarning, stacklevel=5)


def check_names(layers: Layers | None, overrides: Mapping[str, Override], known: list[str]) -> None:
    """Raise ``ValueError`` for a name or regular expression that matches no layer."""
    if layers is not None and not callable(layers):
        is_pattern = isinstance(layers, str)
        for entry in [layers] if is_pattern else layers:
            _check_name("layers", str(entry), known, is_pattern)
    for entry in overrides:
        _check_name("overrides", entry, known, True)


def _check_name(parameter: str, entry: str, known: list[str], is_pattern: bool) -> None:
    if entry in known:
        return
    try:
        if is_pattern and any(re.search(entry, name) for name in known):
            return
    except re.error as error:
        raise ValueError(
            f"{parameter} must hold names or regular expressions, got {entry!r}: {error}."
        ) from error
    raise ValueError(
        f"{parameter} must name linear layers or convolutions of the network, but {entry!r} is "
        f"none{near(entry, known)}."
    )


def near(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message, with the `known` names similar to `name`."""
    every = list(known)
    close = difflib.get_close_matches(name, every, cutoff=0.4)
    if close:
        return f"; near it: {', '.join(close)}"
    return f"; there are {', '.join(every[:5])}{', …' if len(every) > 5 else ''}" if every else ""


def is_selected(name: str, layer: nn.Module, layers: Layers | None) -> bool:
    if layers is None:
        return True
    if isinstance(layers, str):
        return re.search(layers, name) is not None
    return layers(name, layer) if callable(layers) else name in layers


def _factorizer(
    names: list[str],
    method: Method,
    density: float | None,
    value_bits: int | None,
    overrides: Mapping[str, Override],
) -> BaseFactorizer | None:
    """Return the unfitted factorizer of a layer, or None to keep it."""
    bits: float | None = None
    for override in _matching(names, overrides):
        if override is None:
            return None
        if isinstance(override, tuple):
            method, density, bits = (*override, None)[:3]
        elif isinstance(override, (int, float)):
            density = override
        else:
            method = override
            # The density is that of another method, which this one may not have.
            density = density if has_density(unfitted(method)) else None
        if bits is None and not has_bits(unfitted(method)):
            bits = value_bits
        break
    else:
        if value_bits is not None and has_bits(unfitted(method)):
            raise ValueError(
                f"value_bits must be None with {type(unfitted(method)).__name__}, which has bits "
                f"of its own, got {value_bits}."
            )
        bits = value_bits
    metrics.check_density(density)
    return configured(unfitted(method), density, bits)


def unfitted(method: Method) -> BaseFactorizer:
    """Return a new factorizer of a method."""
    if isinstance(method, str) and method in METHODS:
        return clone(METHODS[method].estimator)
    if isinstance(method, BaseFactorizer):
        return clone(method)
    raise ValueError(f"method must be a factorizer or one of {', '.join(METHODS)}, got {method!r}.")


def _matching(names: list[str], overrides: Mapping[str, Override]) -> list[Override]:
    """Return the overrides of a layer: first by name, then by pattern in order."""
    exact = [overrides[name] for name in names if name in overrides]
    patterns = (k for k in overrides if any(re.search(k, name) for name in names))
    return exact or [overrides[pattern] for pattern in patterns]
