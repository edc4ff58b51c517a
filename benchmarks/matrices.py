"""Test matrices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.linalg

from matfact.compare._weights import Weights, load_weights


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix, its name, and the group it is averaged in."""

    name: str
    group: str
    values: np.ndarray

    @property
    def is_transform(self) -> bool:
        """Whether it has an exact fast factorization."""
        return self.group.startswith("transform")


def synthetic(size: int, seed: int) -> Iterator[Matrix]:
    """Yield random matrices of side `size` in float32, like weights."""
    rng = np.random.RandomState(seed)
    gaussian = rng.standard_normal((size, size))
    rank = max(1, size // 16)
    low = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, size)) / np.sqrt(rank)
    points = rng.uniform(size=(size, 2))
    distances = np.linalg.norm(points[:, None] - points[None, :], axis=-1)
    for name, values in {
        "gaussian": gaussian,
        "low-rank + noise": low + 0.5 * rng.standard_normal((size, size)),
        "Gauss kernel": np.exp(-((distances / 0.2) ** 2) / 2),
        "Laplace kernel": np.exp(-distances / 0.2),
    }.items():
        yield Matrix(f"{name} {size}", f"synthetic {size}", values.astype(np.float32))


def transforms(size: int) -> Iterator[Matrix]:
    """Yield matrices with exact factorizations, in double precision; `size` a power of two."""
    group = f"transform {size}"
    yield Matrix(f"Hadamard {size}", group, scipy.linalg.hadamard(size).astype(np.float64))
    yield Matrix(f"DFT {size}", group, scipy.fft.fft(np.eye(size), axis=0))
    side = 2 ** (size.bit_length() // 2)
    columns, rows = (scipy.fft.dct(np.eye(n), axis=0, norm="ortho") for n in (side, size // side))
    yield Matrix(f"2-D DCT {side}×{size // side}", group, np.kron(columns, rows))


def trained(
    path: Path | None, layers: str, per_shape: int, dtype: str = "float32"
) -> Iterator[Matrix]:
    """Yield up to `per_shape` whole matrices of every shape, evenly spaced over the model."""
    weights, model, by_shape = _layers(path, layers)
    for shape, names in by_shape.items():
        group = f"{model} {shape[0]}×{shape[1]}"
        positions = np.linspace(0, len(names) - 1, min(per_shape, len(names))).round()
        for i in positions.astype(int):
            yield Matrix(names[i], group, weights[names[i]].astype(dtype))


def stacked(path: Path | None, layers: str, size: int, dtype: str = "float32") -> Iterator[Matrix]:
    """Yield a square of side `size` cut from concatenated layers of one shape.

    Models small enough for these benchmarks have no larger square matrices.
    """
    weights, model, by_shape = _layers(path, layers)
    for shape, names in by_shape.items():
        if shape[0] >= size > shape[1] and shape[1] * len(names) >= size:
            square = np.concatenate([weights[name] for name in names], axis=1)[:size, :size]
            name = f"{model}, layers of {shape[0]}×{shape[1]} side by side"
            yield Matrix(name, f"{model} {size}×{size}", square.astype(dtype))
            return


def _layers(
    path: Path | None, layers: str
) -> tuple[Weights, str, dict[tuple[int, ...], list[str]]]:
    """Return the weights of a model, its name, and the names of its layers by shape."""
    weights = load_weights(path)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, W in weights.items():
        if re.search(layers, name):
            by_shape.setdefault(W.shape, []).append(name)
    return weights, path.stem if path else weights.source.partition(",")[0], by_shape
