"""Tensor decompositions of layers with tensorly, the baselines of Giffon et al. 2021."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from matfact._text import extra
from matfact.backend import to_numpy
from matfact.metrics import part_of
from matfact.torch.compression._tasks import check_names, is_selected
from matfact.torch.layers._inherit import copied, move_hooks
from matfact.torch.layers._matricized import distinct_layers, is_linear, refusal
from matfact.torch.layers._weights import effective, is_finite, is_frozen, place, tied_places
from matfact.torch.running._tensors import check_trainable, outside_inference_mode


@outside_inference_mode
def tucker_svd(
    model: nn.Module,
    *,
    ranks: Literal["vbmf"] | float = "vbmf",
    singular_values: float = 0.2,
    layers: str | Collection[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Decompose convolutions by Tucker decomposition, and linear layers by truncated SVD.

    A convolution becomes three, of which the first and last have size one (Kim et al., 2016), and a
    linear layer becomes two. Layers that would store more values are not changed.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network.
    ranks : "vbmf" or float, default="vbmf"
        Ranks of convolutions: chosen by variational Bayes from the noise in the unfoldings
        (Nakajima et al., 2013), or the smallest that hold this share of the squared singular
        values, in (0, 1].
    singular_values : float, default=0.2
        Share of the singular values to keep in linear layers, in (0, 1].
    layers : str or collection of str, optional
        A regular expression to search in names of linear layers and ungrouped 1-D or 2-D
        convolutions, or their names. All such layers by default. Layers with complex weights,
        shared parameters or a custom forward are excluded.
    inplace : bool, default=False
        Whether to change `model` instead of a copy.

    Returns
    -------
    torch.nn.Module
        The network, with ordinary layers.

    References
    ----------
    - Y.-D. Kim, E. Park, S. Yoo, T. Choi, L. Yang, D. Shin, "Compression of deep
      convolutional neural networks for fast and low power mobile applications", ICLR 2016.
    - S. Nakajima, M. Sugiyama, S. D. Babacan, R. Tomioka, "Global analytic solution of
      fully-observed variational Bayesian matrix factorization", JMLR 14, 2013.
    """
    if ranks != "vbmf" and not (isinstance(ranks, (int, float)) and 0.0 < ranks <= 1.0):
        raise ValueError(f"ranks must be 'vbmf' or a number in (0, 1], got {ranks!r}.")
    if not 0.0 < singular_values <= 1.0:
        raise ValueError(f"singular_values must be in (0, 1], got {singular_values}.")
    if is_linear(model):
        if inplace:
            raise ValueError("inplace must be False if the network is a single layer.")
        whole = nn.Sequential(model)
        return tucker_svd(whole, ranks=ranks, singular_values=singular_values).get_submodule("0")
    model = _own(model, inplace)
    for names, layer in _chosen(model, layers):
        if isinstance(layer, nn.Linear):
            parts = _svd_parts(layer, singular_values)
        else:
            parts = _tucker_parts(layer, ranks)
        if sum(part.weight.numel() for part in parts) < layer.weight.numel():  # type: ignore
            new = nn.Sequential(*parts).train(layer.training)
            move_hooks(new, layer, names[0])
            for name in names:
                model.set_submodule(name, new)
    return model


@outside_inference_mode
def tensor_train(
    model: nn.Module,
    max_rank: int = 10,
    *,
    n_cores: int = 4,
    layers: str | Collection[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Store the weights of layers as tensor trains (Novikov et al. 2015).

    Layers keep their class; their weights are computed from the cores, which are trained instead.
    Convolutional kernels count as matrices of shape (out, in · kernel size). Layers that would
    store more values are not changed.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network.
    max_rank : int, default=10
        Maximum rank between two cores.
    n_cores : int, default=4
        Number of cores per weight.
    layers, inplace
        As in `tucker_svd`.

    Returns
    -------
    torch.nn.Module
        The network.
    """
    for name, value in (("max_rank", max_rank), ("n_cores", n_cores)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    model = _own(model, inplace)
    for _, layer in _chosen(nn.Sequential(model) if is_linear(model) else model, layers):
        weight = layer.weight
        train = TensorTrain(weight.shape, max_rank, n_cores)
        if train.n_values < weight.numel():
            parametrize.register_parametrization(layer, "weight", train)
            layer.parametrizations.requires_grad_(weight.requires_grad).train(layer.training)
    return model


class TensorTrain(nn.Module):
    """Parametrization of a weight by the cores of its tensor train.

    Parameters
    ----------
    shape : sequence of int
        Shape of the weight, outputs first.
    max_rank, n_cores : int
        As in `tensor_train`.
    """

    def __init__(self, shape: Sequence[int], max_rank: int, n_cores: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.outputs = balanced_factors(shape[0], n_cores)
        self.inputs = balanced_factors(math.prod(shape[1:]), n_cores)
        modes = [o * i for o, i in zip(self.outputs, self.inputs, strict=True)]
        cuts = range(1, n_cores)
        inner = (min(math.prod(modes[:k]), math.prod(modes[k:]), max_rank) for k in cuts)
        self.ranks = [1, *inner, 1]
        self.n_values = sum(
            left * mode * right
            for left, mode, right in zip(self.ranks[:-1], modes, self.ranks[1:], strict=True)
        )

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the cores, of shape (left rank, outputs · inputs, right rank)."""
        tensor = weight.detach().reshape(*self.outputs, *self.inputs)
        n_cores = len(self.outputs)
        pairs = [axis for k in range(n_cores) for axis in (k, n_cores + k)]
        modes = [o * i for o, i in zip(self.outputs, self.inputs, strict=True)]
        array = to_numpy(tensor.double().permute(pairs).reshape(modes))
        if n_cores == 1:
            return (weight.detach().reshape(1, -1, 1),)
        cores = _tensorly().decomposition.tensor_train(array, rank=self.ranks)
        return tuple(torch.from_numpy(np.ascontiguousarray(core)).to(weight) for core in cores)

    def forward(self, *cores: Tensor) -> Tensor:
        """Return the weight."""
        product = cores[0]
        for core in cores[1:]:
            product = torch.tensordot(product, core, dims=1)
        pairs = [n for pair in zip(self.outputs, self.inputs, strict=True) for n in pair]
        n_axes = 2 * len(self.outputs)
        order = [*range(0, n_axes, 2), *range(1, n_axes, 2)]
        return product.reshape(pairs).permute(order).reshape(self.shape)


def balanced_factors(n: int, count: int) -> list[int]:
    """Factorize `n` into `count` integers that are as equal as its primes allow.

    Examples
    --------
    >>> from matfact.torch.tensor_decomposition import balanced_factors
    >>> balanced_factors(512, 4), balanced_factors(10, 4)
    ([4, 4, 4, 8], [1, 1, 2, 5])
    """
    primes, divisor = [], 2
    while n > 1:
        if divisor * divisor > n:
            divisor = n
        while n % divisor == 0:
            primes.append(divisor)
            n //= divisor
        divisor += 1
    factors = [1] * count
    for prime in reversed(primes):
        factors[0] *= prime
        factors.sort()
    return factors


def vbmf_rank(matrix: np.ndarray) -> int:
    """Estimate the rank of a noisy matrix, at least one.

    The global solution of empirical variational Bayes with unknown noise variance keeps the
    singular values above a threshold (Nakajima et al. 2013, Theorem 2 and Corollary 1 on).

    Parameters
    ----------
    matrix : ndarray of shape (n_rows, n_columns)
        A low-rank matrix with noise of equal variance in all entries.
    """
    if min(matrix.shape) == 1:
        return 1
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    short, long = sorted(matrix.shape)
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)
    threshold = (1 + tau) * (1 + alpha / tau)
    if squares[0] == 0.0:
        return 1

    def free_energy(log_variance: float) -> float:
        x = squares / (long * math.exp(log_variance))
        x = np.maximum(x, np.finfo(float).tiny)
        signal = x[x > threshold]
        # Contribution of a kept component.
        shift = signal - 1 - alpha
        t = (shift + np.sqrt(shift**2 - 4 * alpha)) / 2
        kept = np.log(t + 1) + alpha * np.log(t / alpha + 1) - t
        return float(np.sum(x - np.log(x)) + np.sum(kept))

    first = math.ceil(short / (1 + alpha)) - 1
    tail = squares[first:]
    upper = squares.sum() / (short * long)
    lower = max(tail[0] / (long * threshold), tail.mean() / long, upper * np.finfo(float).eps)
    if lower < upper:
        grid = np.linspace(math.log(lower), math.log(upper), 50)
        best = int(np.argmin([free_energy(point) for point in grid]))
        bounds = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
        found = scipy.optimize.minimize_scalar(free_energy, bounds=bounds, method="bounded")
        variance = math.exp(found.x)
    else:
        variance = upper
    return max(1, int(np.sum(squares > long * variance * threshold)))


def energy_rank(matrix: np.ndarray, share: float) -> int:
    """Return the smallest rank that holds a share of the squared singular values."""
    energies = np.cumsum(np.linalg.svd(matrix, compute_uv=False) ** 2)
    # Rounding of the sums must not change the rank.
    return 1 + int(np.sum(energies < share * energies[-1] * (1 - 1e-12)))


def _own(model: nn.Module, inplace: bool) -> nn.Module:
    """Return the network to change: `model` itself, or a copy."""
    if not inplace:
        return copied(model)
    check_trainable(model)
    return model


def _chosen(model: nn.Module, layers: str | Collection[str] | None) -> list[tuple[list[str], Any]]:
    """Return the layers to decompose, with all of their names."""
    tied = tied_places(model)
    found: list[tuple[list[str], Any]] = distinct_layers(model)
    every = [(names, layer) for names, layer in found if _is_plain(layer, tied)]
    known = [name for names, _ in every for name in names]
    check_names(layers, {}, known)
    chosen = [
        (names, layer)
        for names, layer in every
        if any(is_selected(name, layer, layers) for name in names)
    ]
    for (name, *_), layer in chosen:
        if layer.weight.is_meta or not is_finite(layer.weight.detach()):
            raise ValueError(f"model must have finite weights in memory, unlike that of {name!r}.")
    return chosen


def _is_plain(layer: Any, tied: Collection[tuple[Any, ...]]) -> bool:
    """Whether a layer is ungrouped, with a real weight that it does not share."""
    return (
        isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))
        and refusal(layer) is None
        and "weight" in layer._parameters
        and not is_lazy(layer.weight)
        and not layer.weight.is_complex()
        and getattr(layer, "groups", 1) == 1
        and not any(place(parameter) in tied for parameter in layer.parameters())
    )


def _svd_parts(layer: nn.Linear, share: float) -> list[nn.Module]:
    """Return two linear layers."""
    U, S, Vt = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    rank = max(1, part_of(len(S), share))
    root = S[:rank].sqrt()
    first = nn.Linear(layer.in_features, rank, bias=False)
    second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
    weights = [root[:, None] * Vt[:rank], U[:, :rank] * root]
    return _filled([first, second], weights, layer)


def _tucker_parts(layer: Any, ranks: Literal["vbmf"] | float) -> list[nn.Module]:
    """Return a convolution of size one, a small one of the layer's size, and one of size one.

    The second one keeps the padding, since convolutions of size one act on each position
    separately.
    """
    kernel = to_numpy(layer.weight.detach().double())
    unfolded = [np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1) for axis in (0, 1)]
    out_rank, in_rank = (
        vbmf_rank(matrix) if ranks == "vbmf" else energy_rank(matrix, float(ranks))
        for matrix in unfolded
    )
    if math.prod(kernel.shape[2:]) == 1:  # a matrix, for which both ranks are equal
        out_rank = in_rank = min(out_rank, in_rank)
    (core, (left, right)), _ = _tensorly().decomposition.partial_tucker(
        kernel, rank=[out_rank, in_rank], modes=[0, 1], random_state=0
    )
    make: Any = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    middle = make(
        in_rank, out_rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        bias=False, padding_mode=layer.padding_mode,
    )  # fmt: skip
    parts = [
        make(layer.in_channels, in_rank, 1, bias=False),
        middle,
        make(out_rank, layer.out_channels, 1, bias=layer.bias is not None),
    ]
    return _filled(parts, [torch.tensor(np.array(a)) for a in (right.T, core, left)], layer)


def _filled(parts: list[nn.Module], weights: Sequence[Tensor], layer: Any) -> list[nn.Module]:
    """Set the weights of layers, and the bias of the last one from `layer`, on its device."""
    with torch.no_grad():
        for part, weight in zip(parts, weights, strict=True):
            part.to(device=layer.weight.device, dtype=layer.weight.dtype)
            target: Any = part.weight
            target.copy_(weight.reshape(target.shape))
            target.requires_grad_(layer.weight.requires_grad)
        if (bias := effective(layer, "bias")) is not None:
            last: Any = parts[-1]
            last.bias.copy_(bias).requires_grad_(not is_frozen(layer, "bias"))
    return parts


def _tensorly() -> ModuleType:
    try:
        import tensorly
        import tensorly.decomposition
    except ImportError as error:
        raise ImportError(f"tensor decompositions need tensorly: {extra('tensor')}.") from error
    return tensorly
