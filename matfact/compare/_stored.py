"""Matrices that are read where they are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from matfact._safetensors import SafetensorsFile

_FLOATS = {"F16": np.float32, "BF16": np.float32, "F32": np.float32, "F64": np.float64}


class StoredMatrix:
    """A weight in a safetensors file, or a window of it, which workers read by themselves.

    Studies on a cluster then send names instead of numbers.

    Parameters
    ----------
    path : str or Path
        The file, which all workers must reach under this name.
    name : str
        The tensor: a matrix, or a convolution, whose trailing dimensions are taken together.
    rows, columns : slice, optional
        The window, by default all of it.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns.
    dtype : dtype
        float32, or float64 where the file has that.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, or holds no such weight.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> None:
        self.path, self.name, self._window = Path(path), name, (rows, columns)
        spec = SafetensorsFile(path).specs.get(name)
        if spec is None or len(spec.shape) not in (2, 4) or spec.dtype not in _FLOATS:
            raise ValueError(
                f"name must be that of a floating-point weight in {path}, got {name!r}."
            )
        sides = (spec.shape[0], int(np.prod(spec.shape[1:])))
        self.shape = tuple(
            len(range(*part.indices(n))) for part, n in zip(self._window, sides, strict=True)
        )
        self.dtype = np.dtype(_FLOATS[spec.dtype])

    @property
    def ndim(self) -> int:
        """2, as for an array."""
        return 2

    def read(self) -> np.ndarray:
        """Return the numbers."""
        W = SafetensorsFile(self.path).read(self.name)
        return np.ascontiguousarray(W.reshape(len(W), -1)[self._window], dtype=self.dtype)
