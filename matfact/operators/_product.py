"""Product of factors, the result of every fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from matfact import backend
from matfact._checks import check_positive_int
from matfact._safetensors_file import SafetensorsFile
from matfact.backend import Array
from matfact.operators import _arithmetic, _storage
from matfact.operators._arithmetic import ArrayLike, LinearOperator, as_operand, shared_namespace
from matfact.operators._dispatch.advice import Advice, Method, measure, operand
from matfact.operators._dispatch.plan import COMPUTED, Plan, versions
from matfact.operators._display import Displayed
from matfact.operators._encoding import stored_nbytes
from matfact.operators._factor import Factor, dtype_nbytes
from matfact.operators._kronecker import merged
from matfact.operators._quantized import BITS
from matfact.operators._rounding import rounded
from matfact.operators._selection import SelectionFactor

Format = Literal["csr", "bitmask", "smallest", "dense", "stored"]


class FactorProduct(ArrayLike, Displayed):
    """Linear operator ``F_1 F_2 … F_Q``, applied from right to left.

    Products are array-like. ``np.asarray`` returns the dense matrix, and numbers scale the product.
    ``@`` with another product chains the factors of both; with arrays it returns an array.
    `scipy.sparse.linalg.aslinearoperator` and SciPy's iterative solvers accept a product.

    Parameters
    ----------
    factors : sequence of Factor
        Factors with matching inner dimensions, from one array library.

    Raises
    ------
    ValueError
        If there is no factor, or two neighbours do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact.operators import DenseFactor, FactorProduct
    >>> product = FactorProduct([DenseFactor(np.ones((4, 1))), DenseFactor(np.ones((1, 3)))])
    >>> product.shape, product.nnz, product.flops
    ((4, 3), 7, 14)
    >>> product @ np.array([1.0, 2.0, 3.0])
    array([6., 6., 6., 6.])
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        self.factors = tuple(factors)
        if not self.factors:
            raise ValueError("factors must hold at least one factor, got none.")
        for left, right in zip(self.factors, self.factors[1:], strict=False):
            if left.shape[1] != right.shape[0]:
                raise ValueError(
                    f"factors must chain, but a factor with {left.shape[1]} columns is followed "
                    f"by one with {right.shape[0]} rows."
                )

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """Rows (out_features) and columns (in_features) of the product."""
        return (self.factors[0].shape[0], self.factors[-1].shape[1])

    @functools.cached_property
    def dtype(self) -> Any:
        """Dtype of the stored values; if factors differ, the dtype they promote to."""
        dtypes = [factor.dtype for factor in self.factors]
        if all(dtype == dtypes[0] for dtype in dtypes):
            return dtypes[0]
        return backend.namespace(self.factors[0].values).result_type(*dtypes)

    @property
    def nnz(self) -> int:
        """Stored values of all factors."""
        return sum(factor.nnz for factor in self.factors)

    @property
    def density(self) -> float:
        """Stored values ÷ entries of the dense matrix."""
        return self.nnz / max(1, math.prod(self.shape))

    @property
    def flops(self) -> int:
        """Floating-point operations to apply the product to one sample."""
        return sum(factor.flops for factor in self.factors)

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the product ÷ FLOPs of the dense matrix."""
        return self.flops / max(1, 2 * math.prod(self.shape))

    def nbytes(self, format: Format = "csr") -> int:
        """Return the bytes of values and positions, or of a file.

        Parameters
        ----------
        format : {"csr", "bitmask", "smallest", "dense", "stored"}, default="csr"
            How scattered nonzeros are located: column indices, one bit an entry, whichever of
            the two is smaller for each factor, not at all (every entry of every factor is
            stored). Structured factors need few positions or none in the first three.
            ``"stored"`` counts all bytes of the file that `save` writes, its header too.
        """
        if format not in get_args(Format):
            raise ValueError(f"format must be one of {get_args(Format)}, got {format!r}.")
        if format == "dense":
            itemsize = dtype_nbytes(self.dtype)
            return itemsize * sum(math.prod(factor.shape) for factor in self.factors)
        if format == "stored":
            return sum(map(len, _storage.pack(self.factors)[1]))
        return sum(f.value_nbytes() + f.index_nbytes(format) for f in self.factors)

    @property
    def bits_per_weight(self) -> float:
        """Bits that files hold for an entry of the dense matrix, headers aside."""
        bits = 8 * sum(stored_nbytes(factor) for factor in self.factors)
        return bits / max(1, math.prod(self.shape))

    @property
    def T(self) -> FactorProduct:  # noqa: N802
        """The transpose (without conjugation)."""
        return FactorProduct([factor.T for factor in reversed(self.factors)])

    def conj(self) -> FactorProduct:
        """Return the complex conjugate."""
        return FactorProduct([factor.conj() for factor in self.factors])

    def astype(self, dtype: Any) -> FactorProduct:
        """Return the product in another dtype, itself if it already has it."""
        if all(factor.dtype == dtype for factor in self.factors):
            return self
        return FactorProduct([factor.astype(dtype) for factor in self.factors])

    def quantized(self, bits: int, group_size: int | None = 64) -> FactorProduct:
        """Return the product with each value rounded to one of ``2**bits`` levels.

        `matfact.Quantized` loses less: it knows the matrix, and possibly the inputs.
        Factors that store no values stay as they are.

        Parameters
        ----------
        bits : int
            Bits of a value, from 2 to 8.
        group_size : int or None, default=64
            Number of values of a row that share a 16-bit scale, about; None for all of them.

        Raises
        ------
        ValueError
            If an argument is out of range, or values are complex.

        Examples
        --------
        >>> import numpy as np
        >>> from matfact.operators import DenseFactor, FactorProduct
        >>> W = np.random.default_rng(0).standard_normal((64, 64))
        >>> product = FactorProduct([DenseFactor(W)]).quantized(8)
        >>> product.bits_per_weight, bool(abs(product.toarray() - W).max() < 0.02)
        (8.25, True)
        """
        if bits not in BITS:
            raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}.")
        if group_size is not None and (not isinstance(group_size, Integral) or group_size < 1):
            raise ValueError(f"group_size must be None or a positive integer, got {group_size!r}.")
        if any(backend.is_complex(factor.values) for factor in self.factors):
            raise ValueError(f"values must be real to be quantized, got {self.dtype}.")
        return FactorProduct([rounded(factor, bits, group_size) for factor in self.factors])

    def toarray(self) -> Array:
        """Return the product as a dense array."""
        *factors, last = self.factors
        if factors and isinstance(last, SelectionFactor):
            return last.apply_right(FactorProduct(factors).toarray())
        while factors and (both := merged(factors[-1], last)):
            last = both
            factors.pop()
        product = backend.compute_array(last.toarray())
        for factor in reversed(factors):
            product = factor.apply(product)
        return backend.namespace(product).astype(product, self.dtype, copy=False)

    def __matmul__(self, X: Any) -> Any:
        """Apply the product to a vector of shape (in,) or to the columns of (in, batch).

        With another product the result is the product of all factors, with a SciPy
        ``LinearOperator`` a ``LinearOperator``, and with a SciPy sparse matrix an array.
        """
        plan = self._plan
        if plan and type(X) is np.ndarray and (way := plan.ways.get((X.shape, X.dtype))):
            return way(X)  # fast path: small products take few microseconds
        if isinstance(X, FactorProduct):
            return self._chained(X)
        if isinstance(X, LinearOperator):
            return self.to_scipy() @ X
        X = as_operand(X)
        if X.ndim not in (1, 2) or X.shape[0] != self.shape[1]:
            raise ValueError(
                f"X must have shape ({self.shape[1]},) or ({self.shape[1]}, batch) to be "
                f"multiplied by a product of shape {self.shape}, got {tuple(X.shape)}."
            )
        if plan and backend.is_numpy(X) and X.dtype in COMPUTED:
            return plan.apply(X)
        xp = shared_namespace(X, "X", self.factors[0].values, "the factors")
        both_half = backend.is_half(X) and dtype_nbytes(self.factors[0].dtype) == 2
        result = backend.compute_array(X)
        result = xp.reshape(result, (X.shape[0], -1 if X.shape[0] else 1))
        host = backend.host_view(result) if plan else None
        if plan and host is not None and host.dtype in COMPUTED:
            result = xp.asarray(plan.apply(host))
        else:
            result = self._apply_factors(result)
        if both_half:
            result = xp.astype(result, self.dtype)
        return result if X.ndim == 2 else xp.reshape(result, (-1,))

    def _chained(self, other: FactorProduct) -> FactorProduct:
        """Return the product with another one, in the dtype of both."""
        if self.shape[1] != other.shape[0]:
            raise ValueError(
                f"products must chain, but one of shape {self.shape} is followed by one of shape "
                f"{other.shape}."
            )
        _arithmetic.check_same_library(self.factors[0].values, other.factors[0].values)
        product = FactorProduct([*self.factors, *other.factors])
        return product.astype(product.dtype)

    def _apply_factors(self, X: Array) -> Array:
        """Apply the factors one after the other with the array library."""
        for factor in reversed(self.factors):
            X = factor.apply(X)
        return X

    @property
    def _plan(self) -> Plan | None:
        """Prepared forms for the kernels, rebuilt after torch values were modified."""
        plan = self._prepared
        if plan and plan.versions and plan.versions != versions(self.factors):
            del self._prepared
        return self._prepared

    @functools.cached_property
    def _prepared(self) -> Plan | None:
        return Plan(self.factors, self._tuned) if Plan.suits(self.factors) else None

    @functools.cached_property
    def _tuned(self) -> dict[int, Method]:
        """Results of `tune`, which survive changes of the values."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Drop caches, including a dense copy, and the results of tuning."""
        return {"factors": self.factors}

    def method_for(self, batch_size: int) -> Method:
        """Return the method that ``@`` uses for operands of the product's dtype.

        Parameters
        ----------
        batch_size : int
            Columns of the operand; 1 for a vector.

        Returns
        -------
        {"factors", "dense"}
            The result of `tune` for this batch size, or else of a fixed rule.
        """
        batch_size = check_positive_int("batch_size", batch_size)
        return self._plan.method(batch_size, self._plan.dtype) if self._plan else "factors"

    def advise(self, batch_size: int) -> Advice:
        """Time the factors and the dense matrix for a batch.

        Every call times both again, on this machine and possibly with weights in the cache;
        nothing is stored. ``product @ X`` is not affected: its method depends only on shapes and
        stored values, so that results are bit-reproducible. If the dense matrix is faster, use
        ``product.toarray()`` or `tune` the product.

        Parameters
        ----------
        batch_size : int
            Columns of the operand, at least 1.

        Returns
        -------
        Advice
            Seconds with the factors, and of the array library's product with the dense matrix.
        """
        batch_size = check_positive_int("batch_size", batch_size)
        if self._plan:
            return self._plan.advise(batch_size)
        dense = backend.compute_array(self.toarray())
        X = operand(self.shape[1], batch_size, dense, dense.dtype)
        return measure(self._apply_factors, dense.__matmul__, X)

    def tune(self, batch_size: int) -> Advice:
        """Time both methods of ``@`` and use the faster one for this batch size from now on.

        The choice applies to operands with `batch_size` columns of any dtype, and survives changes
        of the values. Results remain bit-reproducible, but differ from earlier ones by rounding.
        Only this object is tuned: copies, pickles, files and products derived from it use the rule.

        Parameters
        ----------
        batch_size : int
            Columns of the operand, at least 1; 1 also stands for vectors.

        Returns
        -------
        Advice
            Seconds of both methods in the product's dtype, the method of the rule, and whether
            tuning ``changed`` it. The dense matrix is applied by the kernels of ``@``, whose
            results do not depend on the number of threads; `advise` times the array library's
            product.

        Raises
        ------
        TypeError
            If ``@`` has only one method, because values are not on the host, need gradients, or
            have a dtype that the kernels do not support.

        Examples
        --------
        >>> import numpy as np
        >>> from matfact.operators import DenseFactor, FactorProduct
        >>> product = FactorProduct([DenseFactor(np.ones((64, 2))), DenseFactor(np.ones((2, 64)))])
        >>> advice = product.tune(16)
        >>> product.method_for(16) == advice.method
        True
        """
        batch_size = check_positive_int("batch_size", batch_size)
        if self._plan is None:
            raise TypeError(
                "tune needs a product whose values are on the host, need no gradient and are "
                "float16, bfloat16, float32, float64, complex64 or complex128, got "
                f"{type(self.factors[0].values).__name__} of {self.dtype}. It is always applied "
                "factor by factor; see advise."
            )
        return self._plan.tune(batch_size)

    def rescaled(self, scale: float) -> FactorProduct:
        """Return `scale` times the product, with balanced Frobenius norms of the factors.

        Only powers of two are moved between factors, so no value is rounded; `scale` should be a
        power of two as well. Fine-tuning needs balanced factors (Boža & Macko 2025 omit this).
        """
        scalable = [i for i, factor in enumerate(self.factors) if math.prod(factor.values.shape)]
        norms = [self.factors[i].norm for i in scalable]
        if not scalable or 0.0 in norms:
            balanced = [scale if i == 0 else 1.0 for i in range(len(scalable))]
        else:
            logs = np.log2(norms)
            target = (np.log2(scale) + logs.sum()) / len(norms)
            exponents = np.round(target - logs[1:])
            balanced = [scale * 2.0 ** -exponents.sum(), *2.0**exponents]
        factors = list(self.factors)
        for i, c in zip(scalable, balanced, strict=True):
            factors[i] = factors[i].scaled(float(c))
        return FactorProduct(factors)

    def save(self, path: str | Path) -> None:
        """Write the product to a safetensors file, atomically."""
        _storage.save(self.factors, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> FactorProduct:
        """Read a product written by `save`, with NumPy values."""
        return cls(_storage.load(SafetensorsFile(path, in_memory=True)))

    def __len__(self) -> int:
        return len(self.factors)

    def __iter__(self) -> Iterator[Factor]:
        return iter(self.factors)

    def __getitem__(self, index: int) -> Factor:
        return self.factors[index]

    def __repr__(self) -> str:
        inner = ", ".join(repr(factor) for factor in self.factors)
        return f"FactorProduct({self.shape[0]}×{self.shape[1]}, {self.density:.1%}: [{inner}])"
