"""Array-like behaviour of products of factors, for NumPy and SciPy."""

from __future__ import annotations

import functools
import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any, Self

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from matfact import backend
from matfact.backend import Array
from matfact.operators._factor import Factor
from matfact.operators._kronecker import KroneckerSparseFactor


class ArrayLike:
    """Matrix operations, computed with the factors of a product.

    ``*`` and ``/`` accept numbers only. Sums with products, sparse matrices and operators are lazy
    SciPy ``LinearOperator`` objects; sums with arrays are arrays.
    """

    # NumPy must leave ``X @ product`` and ``2 * product`` to the methods here.
    __array_ufunc__ = None

    factors: Sequence[Factor]
    ndim = 2  #: number of axes

    @abstractmethod
    def __init__(self, factors: Sequence[Factor]) -> None: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]: ...

    @property
    @abstractmethod
    def dtype(self) -> Any: ...

    @property
    @abstractmethod
    def T(self) -> Self: ...  # noqa: N802

    @abstractmethod
    def conj(self) -> Self: ...

    @abstractmethod
    def toarray(self) -> Array: ...

    @abstractmethod
    def astype(self, dtype: Any) -> Self: ...

    @abstractmethod
    def __matmul__(self, X: Any) -> Any: ...

    @property
    def H(self) -> Self:  # noqa: N802
        """The conjugate transpose."""
        return self.T.conj()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return a new dense matrix."""
        if copy is False:
            raise ValueError("copy must not be False: the dense matrix of a product is a new array")
        return np.array(backend.to_numpy(self.toarray()), dtype=dtype)

    def matvec(self, x: Array) -> Array:
        """Return the product with a vector of shape (in,) or (in, 1)."""
        return self @ x

    def matmat(self, X: Array) -> Array:
        """Return the product with an array of shape (in, batch)."""
        return self @ X

    def rmatvec(self, x: Array) -> Array:
        """Return the product of the conjugate transpose with a vector."""
        return self._adjoint @ x

    def rmatmat(self, X: Array) -> Array:
        """Return the product of the conjugate transpose with an array."""
        return self._adjoint @ X

    def to_scipy(self) -> LinearOperator:
        """Return a SciPy ``LinearOperator`` (NumPy products only)."""
        if not backend.is_numpy(self.factors[0].values):
            raise TypeError("to_scipy needs a product of NumPy factors; load or fit it on NumPy.")
        return LinearOperator(
            shape=self.shape,
            dtype=np.dtype(self.dtype),
            matvec=self.matvec,
            rmatvec=self.rmatvec,
            matmat=self.matmat,
            rmatmat=self.rmatmat,
        )

    @property
    def _adjoint(self) -> Self:
        """The conjugate transpose, cached for NumPy: solvers need it at every step."""
        return self._numpy_adjoint if backend.is_numpy(self.factors[0].values) else self.H

    @functools.cached_property
    def _numpy_adjoint(self) -> Self:
        return self.H

    def __rmatmul__(self, X: Array) -> Array:
        """Return ``X @ product`` for X of shape (out,) or (batch, out)."""
        if isinstance(X, LinearOperator):
            return X @ self.to_scipy()
        X = as_operand(X)
        xp = backend.namespace(X)
        if backend.is_complex(X):
            X = xp.conj(X)
        result = self._adjoint @ (X if X.ndim == 1 else xp.matrix_transpose(X))
        result = result if X.ndim == 1 else xp.matrix_transpose(result)
        return xp.conj(result) if backend.is_complex(result) else result

    def __mul__(self, c: Any) -> Self:
        """Return the product multiplied by a number `c`."""
        return self._scaled(c, operator.mul)

    __rmul__ = __mul__

    def __truediv__(self, c: Any) -> Self:
        """Return the product divided by a number `c`."""
        return self._scaled(c, operator.truediv)

    def _scaled(self, c: Any, operation: Callable[[Array, Any], Array]) -> Self:
        """Return the product with one factor multiplied or divided by a number."""
        if not isinstance(c, Number) and not (backend.is_array(c) and c.ndim == 0):
            raise TypeError(
                f"a product can only be multiplied or divided by a number, got {_described(c)}; "
                "use @ for products of matrices."
            )
        factors = list(self.factors)
        place = next((i for i, f in enumerate(factors) if math.prod(f.values.shape)), None)
        if place is None:  # permutations and signs store no values
            place, ones = 0, np.ones((1, self.shape[0], 1, 1))
            ones = backend.like(ones, factors[0].values, dtype=self.dtype)
            factors.insert(0, KroneckerSparseFactor(ones))
        if isinstance(c, np.generic) and not backend.is_numpy(factors[0].values):
            c = c.item()
        factors[place] = factors[place].with_numbers(operation(factors[place].numbers, c))
        product = type(self)(factors)
        return product.astype(product.dtype)

    def __neg__(self) -> Self:
        return self * -1

    def __pos__(self) -> Self:
        return self * 1

    def __add__(self, other: Any) -> Any:
        """Return the sum with a product, sparse matrix or operator (lazily) or with an array."""
        return self._sum(other, 1, 1)

    def __radd__(self, other: Any) -> Any:
        return self._sum(other, 1, 1)

    def __sub__(self, other: Any) -> Any:
        return self._sum(other, 1, -1)

    def __rsub__(self, other: Any) -> Any:
        return self._sum(other, -1, 1)

    def _sum(self, other: Any, ours: int, theirs: int) -> Any:
        """Return `ours` times this matrix plus `theirs` times another; both are ±1."""
        shape = tuple(getattr(other, "shape", np.shape(other)))
        if shape != self.shape:
            raise ValueError(
                f"a product of shape {self.shape} can only be added to a matrix of that shape, "
                f"got {_described(other)}."
            )
        if backend.is_array(other):
            return ours * self.toarray() + theirs * other
        if isinstance(other, (list, tuple)):
            return ours * self.toarray() + theirs * np.asarray(other)
        mine = self.to_scipy()
        if isinstance(other, ArrayLike):
            other = other.to_scipy()
        other = aslinearoperator(other)
        return (mine if ours > 0 else -mine) + (other if theirs > 0 else -other)


def as_operand(X: Any) -> Array:
    """Return an operand as an array of an Array API library."""
    if scipy.sparse.issparse(X):
        return X.toarray()  # the result is dense in any case
    return X if backend.is_array(X) else np.asarray(X)


def library(array: Array) -> str:
    """Return the name of the library that an array is of."""
    return backend.namespace(array).__name__.removeprefix("array_api_compat.")


def check_same_library(left: Array, right: Array) -> None:
    """Raise ``TypeError`` if the values of two products are of different libraries."""
    names = library(left), library(right)
    if names[0] != names[1]:
        raise TypeError(f"products must have the same array library, got {' and '.join(names)}.")


def shared_namespace(X: Array, name: str, other: Array, owner: str) -> Any:
    """Return the Array API namespace of two arrays, which must share a device, too."""
    given, needed = (f"{library(a)} on {backend.device(a)}" for a in (X, other))
    if given != needed:
        raise ValueError(
            f"{name} must have the library and device of {owner}, {needed}, got {given}."
        )
    return backend.namespace(X)


def _described(other: Any) -> str:
    """Describe an object for messages: its class, and its shape if it has one."""
    shape = getattr(other, "shape", None)
    return type(other).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
