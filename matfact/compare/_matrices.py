"""Test matrices cut from trained weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from matfact.compare._stored import StoredMatrix

DEFAULT_SIZES = (64, 128, 256, 384)
"""Sides of the square matrices that `cut_matrices` cuts by default."""

#: A matrix in memory, or in a file.
M = TypeVar("M", np.ndarray, StoredMatrix)
_ATTENTION = re.compile("attention|attn")
_EMBEDDING = re.compile("embed")
_Shapes = Mapping[str, tuple[int, int]]


class Cut(dict[str, Any]):
    """Matrices by name, and unused layers.

    Attributes
    ----------
    left_out : dict of str to str
        Unused layers, with the reason.
    """

    left_out: dict[str, str]


def cut_matrices(
    weights: Mapping[str, M],
    *,
    sizes: Sequence[int] | None = None,
    per_size: int = 4,
    layers: str | None = None,
    full: bool = False,
    random_state: int = 0,
    dtype: Any = np.float32,
) -> Cut:
    """Cut square windows, and optionally whole matrices, out of trained weights.

    For each size, layers are visited in a random order that depends on `random_state` and the size.
    One window of consecutive rows and columns is cut from each, at a uniformly random offset,
    before any layer is used again. Windows do not depend on the other sizes.

    Parameters
    ----------
    weights : mapping of str to ndarray or StoredMatrix
        Matrices by layer name, as `load_weights` returns them.
    sizes : sequence of int, optional
        Sides of the windows. None means 64, 128, 256 and 384, if the layers are large enough.
    per_size : int, default=4
        Windows of each size, or fewer if the layers do not have enough different ones.
    layers : str, optional
        Regular expression to search in layer names. None selects the attention matrices; without
        any, or with `full`, all matrices except embeddings.
    full : bool, default=False
        Whether to add whole matrices: up to `per_size` of every shape that is not a window size.
    random_state : int, default=0
        Seed.
    dtype : dtype, default=float32
        Floating dtype of the result.

    Returns
    -------
    Cut
        A dict of matrices by name, such as ``"layer.0[64:128, 0:64]"``; whole matrices have the
        name of the layer. Stored matrices of `weights` remain stored. ``left_out`` lists unused
        layers with the reason.

    Raises
    ------
    ValueError
        If an option is invalid, or no layer matches or is large enough.
    """
    _check_positive("per_size", per_size)
    chosen = {name: W.shape for name, W in _select(weights, layers).items()}
    largest = max(min(shape) for shape in chosen.values())
    if sizes is None:
        sizes = [size for size in DEFAULT_SIZES if size <= largest]
    for size in sizes:
        _check_positive("sizes", size)
        if size > largest:
            raise ValueError(
                f"sizes must not exceed {largest}, the largest square in the layers chosen, got "
                f"{size}."
            )
    windows = [
        window for size in sizes for window in _windows(chosen, size, per_size, random_state)
    ]
    candidates = chosen
    if full:
        everything = {name: W.shape for name, W in _select(weights, layers, all_kinds=True).items()}
        windows += _whole(everything, sizes, per_size, random_state)
        candidates = chosen | everything
    if not windows:
        raise ValueError(
            f"sizes must include one of at most {largest}, the largest square in the layers "
            f"chosen (the default is {DEFAULT_SIZES}); or ask for whole matrices with full."
        )
    cut = Cut(
        {
            _name(layer, rows, columns, weights[layer].shape): _cut(
                weights[layer], rows, columns, dtype
            )
            for layer, rows, columns in windows
        }
    )
    taken = {layer for layer, _, _ in windows}
    cut.left_out = {
        name: _reason(name, candidates, layers, sizes, per_size, full)
        for name in weights
        if name not in taken
    }
    return cut


def _reason(
    name: str, candidates: _Shapes, layers: str | None, sizes: Sequence[int], per_size: int,
    full: bool,
) -> str:  # fmt: skip
    """Return why a layer was not used."""
    if name not in candidates:
        if layers is not None:
            return f"its name does not match layers={layers!r}"
        kinds = "no embeddings" if full else "only attention matrices, or no embeddings"
        return f"by default {kinds} are used; select it with layers"
    rows, columns = candidates[name]
    if full and (rows != columns or rows not in sizes):
        return f"per_size={per_size} other matrices of shape {rows}×{columns} were used"
    if not any(size <= min(rows, columns) for size in sizes):
        return f"it is smaller than the windows, with sides {', '.join(map(str, sizes))}"
    return f"the per_size={per_size} windows of each size were cut from other layers"


def _cut(W: Any, rows: slice, columns: slice, dtype: Any) -> Any:
    if isinstance(W, StoredMatrix):
        return W.window(rows, columns, dtype)
    return np.ascontiguousarray(W[rows, columns], dtype=dtype)


_Window = tuple[str, slice, slice]


def _select(
    weights: Mapping[str, M], layers: str | None, *, all_kinds: bool = False
) -> dict[str, M]:
    """Return the layers that match, or the default layers."""
    if layers is not None:
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(
                f"layers must be a regular expression, got {layers!r}: {error}."
            ) from error
        chosen = {name: W for name, W in weights.items() if pattern.search(name)}
        if not chosen:
            raise ValueError(
                f"layers must match at least one layer name, got {layers!r}; the names are "
                f"{', '.join(itertools.islice(weights, 5))}, …"
            )
        return chosen
    attention = {name: W for name, W in weights.items() if _ATTENTION.search(name)}
    others = {name: W for name, W in weights.items() if not _EMBEDDING.search(name)}
    return (attention if not all_kinds else others) or others or dict(weights)


def _windows(shapes: _Shapes, size: int, count: int, seed: int) -> Iterator[_Window]:
    """Yield `count` different square windows, using each layer once before any is reused."""
    shapes = {name: shape for name, shape in shapes.items() if min(shape) >= size}
    available = sum((rows - size + 1) * (cols - size + 1) for rows, cols in shapes.values())
    rng = np.random.RandomState([seed, size])
    seen: set[tuple[str, int, int]] = set()
    for name in itertools.cycle(rng.permutation(sorted(shapes))):
        if len(seen) == min(count, available):
            return
        row, column = (int(rng.randint(n - size + 1)) for n in shapes[name])
        if (name, row, column) not in seen:
            seen.add((name, row, column))
            yield str(name), slice(row, row + size), slice(column, column + size)


def _whole(shapes: _Shapes, sizes: Sequence[int], count: int, seed: int) -> Iterator[_Window]:
    """Yield up to `count` layers of every shape that is not one of the square `sizes`."""
    for rows, cols in sorted(set(shapes.values())):
        if rows != cols or rows not in sizes:
            names = sorted(name for name, shape in shapes.items() if shape == (rows, cols))
            order = np.random.RandomState([seed, rows, cols]).permutation(names)
            for name in order[:count]:
                yield str(name), slice(0, rows), slice(0, cols)


def _name(layer: str, rows: slice, columns: slice, shape: tuple[int, ...]) -> str:
    if (rows.stop - rows.start, columns.stop - columns.start) == shape:
        return layer
    return f"{layer}[{rows.start}:{rows.stop}, {columns.start}:{columns.stop}]"


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
