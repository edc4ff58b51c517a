"""Matrices in files, read on demand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from matfact._bitmasks import locate_all
from matfact._layers import AXES, chosen_weights, matrix_shape
from matfact._safetensors_file import Located, SafetensorsFile

_FLOATS = {"F16": np.float32, "BF16": np.float32, "F32": np.float32, "F64": np.float64}


class StoredMatrix:
    """A weight in a safetensors file, or a window of it, read by workers on demand.

    Studies on a cluster then send names instead of arrays.

    Parameters
    ----------
    path : str or Path
        The file, accessible to all workers under this path.
    name : str
        The tensor: a matrix, or a convolution, with its trailing axes merged.
    rows, columns : slice, optional
        The window, by default the whole matrix.
    dtype : dtype, optional
        Dtype of the result. By default float32, or float64 if the file has float64.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    dtype : dtype
        Dtype of the result.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is damaged, or holds no such weight.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        rows: slice = slice(None),
        columns: slice = slice(None),
        dtype: Any = None,
    ) -> None:
        file = SafetensorsFile(path)
        location = locate_all(file.specs, file.location).get(name)
        if (
            location is None
            or len(location.spec.shape) not in AXES
            or location.spec.dtype not in _FLOATS
        ):
            raise ValueError(f"name must be a floating-point weight in {path}, got {name!r}.")
        self._set(location, rows, columns, dtype)

    @classmethod
    def _at(
        cls,
        location: Located,
        rows: slice = slice(None),
        columns: slice = slice(None),
        dtype: Any = None,
    ) -> StoredMatrix:
        """Return a stored matrix for a window of an existing weight."""
        matrix = cls.__new__(cls)
        matrix._set(location, rows, columns, dtype)
        return matrix

    def _set(self, location: Located, rows: slice, columns: slice, dtype: Any) -> None:
        self._location = location.absolute()
        self.path, self.name = self._location.files[0], location.name
        self._window = (rows, columns)
        self._sides = matrix_shape(location.spec.shape)
        chosen = [range(n)[part] for n, part in zip(self._sides, self._window, strict=True)]
        self.shape = (len(chosen[0]), len(chosen[1]))
        self.dtype = np.dtype(_FLOATS[location.spec.dtype] if dtype is None else dtype)

    @property
    def ndim(self) -> int:
        """2, as for an array."""
        return 2

    def window(self, rows: slice, columns: slice, dtype: Any = None) -> StoredMatrix:
        """Return a part of the matrix, without reading it."""
        rows = _composed(self._sides[0], self._window[0], rows)
        columns = _composed(self._sides[1], self._window[1], columns)
        return StoredMatrix._at(self._location, rows, columns, dtype or self.dtype)

    def read(self) -> np.ndarray:
        """Read the matrix, or raise ``ValueError`` if the file has changed."""
        W = self._location.read()
        return np.ascontiguousarray(W.reshape(len(W), -1)[self._window], dtype=self.dtype)


def _composed(length: int, outer: slice, inner: slice) -> slice:
    """Return the slice `inner` of the slice `outer`."""
    chosen = range(length)[outer][inner]
    return slice(chosen.start, chosen.stop if chosen.stop >= 0 else None, chosen.step)


def stored_matrices(path: Path) -> Iterator[tuple[str, StoredMatrix]]:
    """Yield the weights in a file by name, without reading them."""
    file = SafetensorsFile(path)
    located = locate_all(file.specs, file.location)
    for name in sorted(chosen_weights({n: tensor.spec for n, tensor in located.items()})):
        yield name, StoredMatrix._at(located[name])
