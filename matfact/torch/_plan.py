"""Which layers of a network are compressed, and how."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sklearn.base import clone
from torch import Tensor, nn

from matfact import metrics
from matfact.backend import Array
from matfact.compare import METHODS as COMPARED
from matfact.factorizers import ADMMPruner, BaseFactorizer, WandaPruner
from matfact.torch._fit import Fitted
from matfact.torch._matrices import Matricized, distinct_layers, matricized
from matfact.torch.report import LayerReport

#: Factorizers by name: those compared on weights alone, and those that need inputs to differ.
METHODS: dict[str, BaseFactorizer] = {
    **{name: method.estimator for name, method in COMPARED.items()},
    "admm": ADMMPruner(),
    "wanda": WandaPruner(),
}
#: A factorizer, or its name in :data:`METHODS`.
Method = str | BaseFactorizer
#: Layers by regular expression, by name, or by a function of name and module.
Layers = str | Collection[str] | Callable[[str, nn.Module], bool]
#: What one layer gets in place of the rule: a method, a density, both, or None to be kept.
Override = Method | float | tuple[Method, float] | None


@dataclasses.dataclass
class Task:
    """A layer and what to do with it.

    Attributes
    ----------
    names : list of str
        Every name the layer has in the network.
    view : Matricized
        The layer as matrices.
    factorizer : BaseFactorizer or None
        Unfitted; None where the layer is kept.
    message : str
        Why it is kept, or what is to be known about it.
    is_given : bool
        Whether an override says what it gets.
    """

    names: list[str]
    view: Matricized
    factorizer: BaseFactorizer | None
    message: str = ""
    is_given: bool = False

    def problem(self) -> tuple[BaseFactorizer, list[Array], bool]:
        """Return the factorizer, the matrices, and whether there is a bias."""
        assert self.factorizer is not None
        layer: Any = self.view.layer
        return self.factorizer, self.view.arrays(), layer.bias is not None

    def report(self, status: str, fitted: Fitted | None = None) -> LayerReport:
        """Return the row of the report."""
        matrices = self.view.matrices()
        size = sum(matrix.numel() for matrix in matrices)
        row = LayerReport(
            layer=self.names[0],
            kind=type(self.view.layer).__name__,
            rows=matrices[0].shape[0],
            columns=matrices[0].shape[1],
            groups=len(matrices),
            method="" if status == "kept" else type(self.factorizer).__name__,
            status=status,
            dense_nbytes=size * matrices[0].element_size(),
            dense_flops=2 * size,
            requested_density=getattr(self.factorizer, "density", None),
            message=self.message,
        )
        if fitted is None:
            return row
        return dataclasses.replace(row, **_measures(fitted, size, matrices[0].element_size()))


def _measures(fitted: Fitted, size: int, itemsize: int) -> dict[str, Any]:
    products = fitted.products
    return {
        "density": sum(product.nnz for product in products) / size,
        "relative_error": fitted.relative_error,
        "normalized_error": fitted.normalized_error,
        "layer_error": fitted.layer_error,
        "fitted_layer_error": fitted.fitted_layer_error,
        "nbytes": fitted.nbytes(itemsize),
        "flops": sum(product.flops for product in products),
        "seconds": fitted.seconds,
    }


def plan(
    model: nn.Module,
    method: Method,
    density: float | None,
    layers: Layers | None,
    overrides: Mapping[str, Override],
    keep: tuple[bool, bool],
) -> list[Task]:
    """Return a task for each selected layer, in the order of the network.

    Raises
    ------
    ValueError
        If a parameter is invalid or no layer is selected.
    """
    metrics.check_density(density)
    tasks = []
    for names, layer in distinct_layers(model):
        view = matricized(layer)
        if view is None or not any(_selected(name, layer, layers) for name in names):
            continue
        factorizer = _factorizer(names, method, density, overrides)
        message = "" if factorizer else "kept as asked"
        is_given = bool(_matching(names, overrides))
        tasks.append(Task(names, view, factorizer, message, is_given))
    if not tasks:
        raise ValueError(f"layers must select linear layers or convolutions, but {layers!r} none.")
    for task, is_kept in zip((tasks[0], tasks[-1]), keep, strict=True):
        if is_kept:
            task.factorizer, task.message = None, "kept as asked"
    _keep_shared(model, tasks)
    return tasks


def _selected(name: str, layer: nn.Module, layers: Layers | None) -> bool:
    if layers is None:
        return True
    if isinstance(layers, str):
        return re.search(layers, name) is not None
    return layers(name, layer) if callable(layers) else name in layers


def _factorizer(
    names: list[str], method: Method, density: float | None, overrides: Mapping[str, Override]
) -> BaseFactorizer | None:
    """Return the unfitted factorizer of a layer, None to keep it."""
    for override in _matching(names, overrides):
        if override is None:
            return None
        if isinstance(override, tuple):
            method, density = override
        elif isinstance(override, (int, float)):
            density = override
        else:
            method = override
        break
    metrics.check_density(density)
    if isinstance(method, str) and method in METHODS:
        factorizer = clone(METHODS[method])
    elif isinstance(method, BaseFactorizer):
        factorizer = clone(method)
    else:
        raise ValueError(
            f"method must be a factorizer or one of {', '.join(METHODS)}, got {method!r}."
        )
    return factorizer if density is None else factorizer.set_params(density=density)


def _matching(names: list[str], overrides: Mapping[str, Override]) -> list[Override]:
    """Return the overrides of a layer: one of its names first, then the patterns in order."""
    exact = [overrides[name] for name in names if name in overrides]
    patterns = (k for k in overrides if any(re.search(k, name) for name in names))
    return exact or [overrides[pattern] for pattern in patterns]


def _keep_shared(model: nn.Module, tasks: list[Task]) -> None:
    """Keep layers whose weight another module uses, as replacing them would store it twice."""
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    for task in tasks:
        weight: Any = task.view.layer.weight
        if task.factorizer is not None and len(owners.get(weight, ())) > 1:
            task.factorizer, task.message = None, "kept: its weight is shared with another module"
