"""Streaming statistics of a layer's inputs and outputs, for calibrated factorizations."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Self

from matfact import backend, metrics
from matfact.backend import Array

#: Minimum number of rows converted to double precision at a time, to bound the extra memory.
_SLAB = 256

#: An input counts as constant if variance ÷ second moment is below this.
_CONSTANT = 1e-12

#: Entries must be smaller than this, so that sums of their squares do not overflow.
_LARGEST = 1e150


def _slabs(batch: Array) -> Iterator[slice]:
    """Yield slabs of rows, each about the size of a Gram matrix."""
    n_samples, n_features = map(int, batch.shape)
    return backend.slabs(n_samples, max(_SLAB, n_features))


def _check_size(batch: Array, name: str) -> None:
    """Raise ``ValueError`` if `batch` is complex or the squares of its entries are not finite."""
    if backend.is_complex(batch):
        raise ValueError(f"{name} must be real, got {batch.dtype}.")
    if not backend.max_abs(batch) < _LARGEST:
        raise ValueError(f"{name} must be finite, with entries smaller than {_LARGEST:g}.")


def _zeros_like(inputs: Array, outputs: Array) -> tuple[Array, Array]:
    """Return initial values of ``inputsᵀ · outputs`` and of the sum of outputs."""
    xp, device = backend.namespace(outputs), backend.device(outputs)
    n_inputs, n_outputs = inputs.shape[1], outputs.shape[1]
    sums = xp.zeros((n_inputs, n_outputs), dtype=outputs.dtype, device=device)
    return sums, xp.zeros((n_outputs,), dtype=outputs.dtype, device=device)


def _total(a: Array, b: Array) -> Array:
    """Return the sum of two arrays as a new array; None counts as zero."""
    known = [each for each in (a, b) if each is not None]
    if len(known) < 2:
        return backend.namespace(*known).asarray(known[0], copy=True) if known else None
    return a + b


def _add_gram(gram: Array, X: Array) -> None:
    """Add ``XᵀX``, in slabs of rows, computing each pair of features once."""
    xp = backend.namespace(X)
    for rows in backend.slabs(gram.shape[0]):
        products = xp.matmul(xp.matrix_transpose(X[:, rows]), X[:, rows.start :])
        gram[rows, rows.start :] += products
        mirrored = products[:, rows.stop - rows.start :]
        gram[rows.stop :, rows] += xp.matrix_transpose(mirrored)


class InputStatistics:
    """Sums and second moments of a layer's inputs, accumulated in double precision.

    Batches are not kept, so memory is that of one Gram matrix for any number of inputs.

    Attributes
    ----------
    count : int
        Number of inputs seen.
    gram : array of shape (n_features, n_features)
        ``XᵀX`` of all inputs `X`, on the same device as the batches.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact.calibration import InputStatistics
    >>> statistics = InputStatistics()
    >>> for batch in (np.array([[1.0, 0.0]]), np.array([[3.0, 2.0]])):
    ...     statistics = statistics.update(batch)
    >>> statistics.count, statistics.mean
    (2, array([2., 1.]))
    >>> statistics.gram
    array([[10.,  6.],
           [ 6.,  4.]])
    """

    def __init__(self) -> None:
        self.count = 0
        self.gram: Array = None
        self._sum: Array = None

    def update(self, batch: Array) -> Self:
        """Add a batch of inputs.

        Parameters
        ----------
        batch : array of shape (n_samples, n_features)
            Real inputs. All batches must share one array library and device.

        Returns
        -------
        self : InputStatistics
            The updated statistics.

        Raises
        ------
        ValueError
            If `batch` is not 2-D, differs in the number of features from earlier ones, or is not
            finite.
        """
        if batch.ndim != 2 or (self.count and batch.shape[1] != self.n_features):
            expected = f"(n_samples, {self.n_features})" if self.count else "(n_samples, features)"
            raise ValueError(f"batch must have shape {expected}, got {tuple(batch.shape)}.")
        if not batch.shape[0]:
            return self
        _check_size(batch, "batch")
        xp = backend.namespace(batch)
        for rows in _slabs(batch):
            slab = xp.astype(batch[rows, :], backend.double(batch))
            if self.gram is None:
                self.gram, self._sum = _zeros_like(slab, slab)
            _add_gram(self.gram, slab)
            self._sum += xp.sum(slab, axis=0)
        self.count += int(batch.shape[0])
        return self

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Return the statistics of both sets of inputs together."""
        result = InputStatistics()
        result.count = self.count + other.count
        result.gram, result._sum = _total(self.gram, other.gram), _total(self._sum, other._sum)
        return result

    @property
    def n_features(self) -> int:
        """Width of the inputs (0 before the first batch)."""
        return 0 if self.gram is None else int(self.gram.shape[0])

    @property
    def mean(self) -> Array:
        """Mean input, of shape (n_features,)."""
        return self._sum / self.count

    @property
    def second_moment(self) -> Array:
        """Average of ``x xᵀ``: the Gram matrix ÷ the count."""
        return self.gram / self.count

    @property
    def covariance(self) -> Array:
        """Average of ``(x − mean)(x − mean)ᵀ``."""
        return self.second_moment - self.mean[:, None] * self.mean[None, :]

    def reordered(self, order: Array) -> InputStatistics:
        """Return the statistics with the features permuted."""
        xp, index = backend.namespace(self.gram), backend.like(order, self.gram)
        result = InputStatistics()
        result.count, result._sum = self.count, xp.take(self._sum, index)
        result.gram = xp.take(xp.take(self.gram, index, axis=0), index, axis=1)
        return result

    def damped(self, damping: float) -> InputStatistics:
        """Return the statistics with a share of the Gram matrix's diagonal added to it."""
        result = InputStatistics()
        result.count, result._sum = self.count, self._sum
        added = damping * backend.namespace(self.gram).linalg.diagonal(self.gram)
        result.gram = backend.add_diagonal(self.gram, added)
        return result

    def centered(self, about: InputStatistics | None = None) -> InputStatistics:
        """Return the statistics of the deviations from the mean, for maps with a bias.

        Inputs with negligible variance count as constant.

        Parameters
        ----------
        about : InputStatistics, optional
            Statistics that provide the mean. By default these statistics.
        """
        xp = backend.namespace(self.gram)
        mean = self.mean if about is None else about.mean
        result = InputStatistics()
        result.count, result._sum = self.count, self._sum - self.count * mean
        if about is None:
            result._sum = xp.zeros_like(self._sum)
        squares = xp.linalg.diagonal(self.gram)
        varies = squares - (2 * self._sum - self.count * mean) * mean > _CONSTANT * squares
        varies = xp.astype(varies, self.gram.dtype)
        result.gram = xp.empty_like(self.gram)
        for rows in backend.slabs(self.n_features):  # no third matrix of this size
            slab = self.gram[rows, :] - self._sum[rows, None] * mean[None, :]
            slab -= mean[rows, None] * result._sum[None, :]
            result.gram[rows, :] = slab * varies[rows, None] * varies[None, :]
        return result


class OutputStatistics:
    """Statistics of a layer's inputs together with its outputs, or with any targets.

    They determine the error of any linear map from inputs to outputs, and hence least-squares fits
    on all inputs or on a subset.

    Attributes
    ----------
    inputs : InputStatistics
        Statistics of the inputs `X`.
    cross : array of shape (n_features, n_outputs)
        ``XᵀU`` for the outputs `U`.
    energy : float
        ``‖U‖_F²``.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact.calibration import OutputStatistics
    >>> X, U = np.array([[1.0, 0.0], [1.0, 2.0]]), np.array([[3.0], [1.0]])
    >>> statistics = OutputStatistics().update(X, U)
    >>> np.linalg.solve(statistics.inputs.gram, statistics.cross)
    array([[ 3.],
           [-1.]])
    """

    def __init__(self) -> None:
        self.inputs = InputStatistics()
        self.cross: Array = None
        self.energy = 0.0
        self._sum: Array = None

    def update(self, inputs: Array, outputs: Array) -> Self:
        """Add a batch.

        Parameters
        ----------
        inputs : array of shape (n_samples, n_features)
            Real inputs. All batches must share one array library and device.
        outputs : array of shape (n_samples, n_outputs)
            Outputs for these inputs, with the same library and device.

        Returns
        -------
        self : OutputStatistics
            The updated statistics.

        Raises
        ------
        ValueError
            If shapes do not match each other or earlier batches, or an entry is not finite.
        """
        if outputs.ndim != 2 or inputs.shape[0] != outputs.shape[0]:
            raise ValueError(
                f"outputs must have shape ({inputs.shape[0]}, n_outputs), one row for each input, "
                f"got {tuple(outputs.shape)}: inconsistent numbers of samples."
            )
        if self.cross is not None and outputs.shape[1] != self.cross.shape[1]:
            raise ValueError(
                f"outputs must have {self.cross.shape[1]} columns, got {outputs.shape[1]}."
            )
        if not inputs.shape[0]:
            return self
        _check_size(outputs, "outputs")
        self.inputs.update(inputs)
        xp = backend.namespace(inputs, outputs)
        for rows in _slabs(inputs):
            slab = xp.astype(outputs[rows, :], backend.double(outputs))
            entered = xp.astype(inputs[rows, :], backend.double(inputs))
            if self.cross is None:
                self.cross, self._sum = _zeros_like(entered, slab)
            for part in backend.slabs(self.cross.shape[0]):
                self.cross[part, :] += xp.matmul(xp.matrix_transpose(entered[:, part]), slab)
            self._sum += xp.sum(slab, axis=0)
            self.energy += float(xp.sum(slab**2))
        return self

    def __add__(self, other: OutputStatistics) -> OutputStatistics:
        """Return the statistics of both sets of pairs together."""
        result = OutputStatistics()
        result.inputs, result.energy = self.inputs + other.inputs, self.energy + other.energy
        result.cross, result._sum = _total(self.cross, other.cross), _total(self._sum, other._sum)
        return result

    @property
    def mean(self) -> Array:
        """Mean output, of shape (n_outputs,)."""
        return self._sum / self.inputs.count

    def centered(self, about: OutputStatistics | None = None) -> OutputStatistics:
        """Return the statistics of the deviations from the means, for maps with a bias.

        Inputs with negligible variance count as constant.

        Parameters
        ----------
        about : OutputStatistics, optional
            Statistics that provide the means. By default these statistics.
        """
        source = self if about is None else about
        inputs, outputs = source.inputs.mean, source.mean
        count, xp = self.inputs.count, backend.namespace(inputs)
        result = OutputStatistics()
        result.inputs = self.inputs.centered(None if about is None else about.inputs)
        varies = xp.astype(xp.linalg.diagonal(result.inputs.gram) > 0, inputs.dtype)
        lost, wanted = self.inputs.mean, self.mean  # Σ (x − a)(u − b)ᵀ with the sums of x and u
        moved = count * (lost[:, None] * outputs[None, :] + inputs[:, None] * (wanted - outputs))
        result.cross = (self.cross - moved) * varies[:, None]
        energy = float(xp.sum(outputs * (2 * wanted - outputs)))
        result.energy = max(0.0, self.energy - count * energy)
        result._sum = xp.zeros_like(outputs) if about is None else self._sum - count * outputs
        return result

    def squared_error(self, W: Array) -> float:
        """Return ``‖U − X Wᵀ‖_F²`` for the linear map `W`.

        Parameters
        ----------
        W : array of shape (n_outputs, n_features)
            The map.
        """
        xp, total = backend.namespace(W), self.energy
        for rows in backend.slabs(W.shape[0]):
            slab = backend.wide(W[rows, :])
            image = xp.matmul(slab, self.inputs.gram)
            image -= 2.0 * xp.matrix_transpose(self.cross[:, rows])
            total += float(xp.sum(image * slab))
        return max(0.0, total)


@dataclasses.dataclass(frozen=True, eq=False)
class MapStatistics:
    """Statistics of inputs and of their outputs under a linear map.

    Equivalent to `OutputStatistics`, but holds the map instead of sums over outputs.

    Parameters
    ----------
    inputs : InputStatistics
        Statistics of the inputs.
    W : array of shape (n_outputs, n_features)
        The map.
    """

    inputs: InputStatistics
    W: Array

    @property
    def mean(self) -> Array:
        """Mean output, of shape (n_outputs,)."""
        return backend.wide(self.W) @ self.inputs.mean

    @functools.cached_property
    def energy(self) -> float:
        """``‖U‖_F²``."""
        return metrics.output_energy(self.W, self.inputs.gram)

    def squared_error(self, W: Array) -> float:
        """Return ``‖U − X Wᵀ‖_F²`` for the linear map `W`."""
        gram, slabs = self.inputs.gram, backend.slabs(W.shape[0])
        wide = backend.wide
        return math.fsum(
            metrics.output_energy(wide(self.W[rows, :]) - wide(W[rows, :]), gram) for rows in slabs
        )

    def centered(self, about: MapStatistics | None = None) -> MapStatistics:
        """Return the statistics of the deviations, like `OutputStatistics`."""
        inputs = self.inputs.centered(None if about is None else about.inputs)
        return MapStatistics(inputs, self.W)
