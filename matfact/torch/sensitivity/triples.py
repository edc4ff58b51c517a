"""Sensitivity of a network's outputs to the singular triples of its layers (Liu et al.)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn

from matfact.solvers.block_svd import Blocking
from matfact.torch.calibration.statistics import layer_input, layer_views
from matfact.torch.layers._matricized import Matricized
from matfact.torch.layers.conv import pad
from matfact.torch.running._batches import checked, eval_mode, forward

Statistic = Literal["perturbation", "variance"]
Scores = dict[str, list[np.ndarray]]
Grids = Mapping[str, tuple[int, int]]


def triple_scores(
    model: nn.Module,
    batches: Iterable[Any],
    layers: str | Sequence[str] | None = None,
    *,
    grids: Grids | None = None,
    statistic: Statistic = "perturbation",
    n_probes: int = 16,
    random_state: int | np.random.RandomState | None = 0,
) -> Scores:
    """Score the singular triples of all layers by the first-order change of the outputs.

    Removing a triple changes the outputs, to first order, by their derivative along it (Liu et al.,
    2022). One forward pass, and one backward pass per output or per random combination of outputs
    (at most `n_probes`), give the derivatives along all triples. `exact_triple_scores` needs
    one pass per triple.

    Parameters
    ----------
    model : torch.nn.Module
        The network, run in eval mode; its output is a tensor with one row per sample.
    batches : iterable
        Inputs of the network, as in `matfact.torch.input_statistics`.
    layers : str or sequence of str, optional
        A regular expression to search in names of linear layers or ungrouped 2-D convolutions, or
        their names. All such layers by default.
    grids : mapping of str to tuple of int, optional
        Numbers of row and column strips into which a layer's matrix is cut; by default (1, 1).
    statistic : {"perturbation", "variance"}, default="perturbation"
        Mean of ``‖y − y₋ᵢ‖²``, or variance of ``y − y₋ᵢ`` averaged over the outputs.
    n_probes : int, default=16
        Maximum number of backward passes per batch.
    random_state : int, RandomState or None, default=0
        Seed of the random combinations.

    Returns
    -------
    dict of str to list of ndarray
        For each layer, the scores of the triples of each block, for
        `matfact.allocation.rank_triples`.

    References
    ----------
    - Y. Liu, S. Joshi, B. Mirzasoleiman, "Low rank pruning via output perturbation", 2022.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch import exact_triple_scores, triple_scores
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    >>> batches = [torch.randn(8, 3)]
    >>> fast, exact = triple_scores(model, batches), exact_triple_scores(model, batches)
    >>> bool(abs(fast["0"][0] - exact["0"][0]).max() < 1e-4)  # the network is linear
    True
    """
    views = _checked_views(model, layers, grids, statistic)
    triples = {
        name: _Triples(view, (grids or {}).get(name, (1, 1))) for name, view in views.items()
    }
    n_samples, probes = 0, torch.empty(0)
    squares: dict[str, Any] = dict.fromkeys(views, 0.0)
    sums: dict[str, dict[int, Any]] = {name: {} for name in views}  # by probe
    with eval_mode(model), torch.enable_grad():
        for batch in checked(batches):
            with _recorded(triples) as record:
                outputs = _rows(forward(model, batch))
            if not n_samples:
                probes = _probes(outputs, n_probes, check_random_state(random_state))
            n_samples += len(outputs)
            calls = [(name, *call) for name, called in record.items() for call in called]
            tensors = [output for *_, output in calls]
            for i, probe in enumerate(probes):
                slopes = torch.autograd.grad(
                    (outputs * probe).sum(), tensors, retain_graph=i + 1 < len(probes),
                    allow_unused=True,
                )  # fmt: skip
                changes: dict[str, Any] = {}
                for (name, inner, _), slope in zip(calls, slopes, strict=True):
                    if slope is not None:  # sum over repeated calls of a layer
                        change = triples[name].changes(inner, slope)
                        changes[name] = changes.get(name, 0.0) + change
                for name, change in changes.items():
                    squares[name] = squares[name] + (change**2).sum(0)
                    sums[name][i] = sums[name].get(i, 0.0) + change.sum(0)
    scores = {}
    for name, triple in triples.items():
        total = squares[name] / n_samples
        if statistic == "variance":
            means = [s / n_samples for s in sums[name].values()]
            total = total - sum(mean**2 for mean in means)
            total = total / outputs.shape[1]
        scores[name] = triple.split(total)
    return scores


def exact_triple_scores(
    model: nn.Module,
    batches: Iterable[Any],
    layers: str | Sequence[str] | None = None,
    *,
    grids: Grids | None = None,
    statistic: Statistic = "perturbation",
) -> Scores:
    """Score the singular triples of all layers by removing them one at a time.

    Parameters and result as in `triple_scores`; `batches` are kept in memory.
    """
    views = _checked_views(model, layers, grids, statistic)
    batches = list(checked(batches))
    scores: Scores = {}
    with eval_mode(model), torch.no_grad():
        reference = torch.cat([_rows(forward(model, batch)) for batch in batches])
        for name, view in views.items():
            triple, weight = _Triples(view, (grids or {}).get(name, (1, 1))), view.layer.weight
            kept, found = weight.detach().clone(), []
            try:
                for left, right in zip(triple.left.T, triple.right, strict=True):
                    weight.copy_(kept - torch.outer(left, right).reshape(kept.shape))
                    outputs = torch.cat([_rows(forward(model, batch)) for batch in batches])
                    found.append(_score(reference - outputs, statistic))
            finally:
                weight.copy_(kept)
            scores[name] = triple.split(torch.tensor(found))
    return scores


class _Triples:
    """Singular triples of all blocks of a layer; right vectors include the singular values."""

    def __init__(self, view: Matricized, grid: tuple[int, int]) -> None:
        (W,) = view.matrices()
        self.layer = view.layer
        blocking = Blocking((W.shape[0], W.shape[1]), grid)
        lefts, rights = [], []
        for (r0, r1, c0, c1), block in zip(blocking.spans, blocking.cut(W), strict=True):
            U, s, Vh = torch.linalg.svd(block, full_matrices=False)
            lefts.append(nn.functional.pad(U, (0, 0, r0, W.shape[0] - r1)))
            rights.append(nn.functional.pad(s[:, None] * Vh, (c0, W.shape[1] - c1)))
        self.left, self.right = torch.cat(lefts, dim=1), torch.cat(rights)
        self._lengths = [len(right) for right in rights]

    def project(self, x: Tensor) -> Tensor:
        """Project the layer inputs `x` on the right vectors; shape (samples, triples, …)."""
        if not isinstance(self.layer, nn.Conv2d):
            return (x @ self.right.T).reshape(len(x), -1, len(self.right)).mT
        conv = self.layer
        kernels = self.right.reshape(-1, *conv.weight.shape[1:])
        x = pad(x, conv)
        inner = nn.functional.conv2d(x, kernels, stride=conv.stride, dilation=conv.dilation)
        return inner.flatten(2)

    def changes(self, inner: Tensor, slope: Tensor) -> Tensor:
        """Return the change of a probe of the outputs with each triple, per sample.

        `inner` is the result of `project`, `slope` the derivative of the probe with respect
        to the outputs of the layer.
        """
        if isinstance(self.layer, nn.Conv2d):
            slope = slope.flatten(2).mT
        else:
            slope = slope.reshape(len(slope), -1, slope.shape[-1])
        return (inner.mT * (slope @ self.left)).sum(1)

    def split(self, scores: Any) -> list[np.ndarray]:
        """Return the scores block by block."""
        every = torch.as_tensor(scores).expand(sum(self._lengths)).double().cpu().numpy()
        return np.split(every, np.cumsum(self._lengths)[:-1])


def _checked_views(
    model: nn.Module, layers: str | Sequence[str] | None, grids: Grids | None, statistic: Statistic
) -> dict[str, Matricized]:
    """Return the matrix views of the layers, if their triples can be scored."""
    if statistic not in get_args(Statistic):
        raise ValueError(f"statistic must be one of {get_args(Statistic)}, got {statistic!r}.")
    views = layer_views(model, layers)
    if unknown := sorted(set(grids or {}) - set(views)):
        raise ValueError(f"grids must name layers that are scored, got {unknown}.")
    for name, view in views.items():
        layer = view.layer
        plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if not (plain and "weight" in layer._parameters):
            raise ValueError(
                "layers must name linear layers or ungrouped 2-D convolutions with a plain weight, "
                f"got {name!r}, a {type(layer).__name__}."
            )
    return views


@contextmanager
def _recorded(triples: Mapping[str, _Triples]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Record the projected input and the output of each call of a layer in the block."""
    record: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> Any:
        def keep(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            # Gradients are needed even if all parameters are frozen.
            output = output if output.requires_grad else output.detach().requires_grad_()
            inner = triples[name].project(layer_input(args, kwargs).detach())
            record.setdefault(name, []).append((inner, output))
            return output.clone()  # which activations may overwrite

        return keep

    handles = [
        triple.layer.register_forward_hook(hook(name), with_kwargs=True)
        for name, triple in triples.items()
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _rows(outputs: Any) -> Tensor:
    """Return the outputs of a network, one row per sample."""
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model must return a tensor, got {type(outputs).__name__}.")
    return outputs.reshape(len(outputs), -1)


def _probes(outputs: Tensor, n_probes: int, rng: np.random.RandomState) -> Tensor:
    """Return random combinations of the outputs with the same expected squared norm."""
    n = outputs.shape[1]
    if n <= n_probes:
        return torch.eye(n, dtype=outputs.dtype, device=outputs.device)
    signs = rng.choice([-1.0, 1.0], size=(n_probes, n)) / np.sqrt(n_probes)
    return torch.as_tensor(signs, dtype=outputs.dtype, device=outputs.device)


def _score(change: Tensor, statistic: Statistic) -> float:
    """Return the score of a triple from the change of the outputs without it."""
    if statistic == "variance":
        return float(change.var(0, correction=0).mean())
    return float((change**2).sum(1).mean())
