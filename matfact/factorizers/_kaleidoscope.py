"""Kaleidoscope factorization: butterflies times reversed butterflies."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import scipy.fft
from sklearn.utils._param_validation import Interval

from matfact import backend
from matfact.backend import Array
from matfact.factorizers._base import BaseFactorizer, Factorization
from matfact.factorizers._validation import MOST_FACTORS, PADDING, ROOM, room
from matfact.operators import Factor, KroneckerSparseFactor, SelectionFactor
from matfact.solvers._callback import History
from matfact.solvers.kaleidoscope import kaleidoscope


class KaleidoscopeFit(BaseFactorizer):
    """Product of butterflies and reversed butterflies (kaleidoscope matrix).

    With a suitable width and expansion, ``(B B*)ʷ`` represents all structured matrices of
    practical use (Dao et al., 2020). Butterflies, circulant and Toeplitz matrices are recovered to
    rounding. The factors have no closed form; they are found jointly by gradient descent from the
    nearest butterfly or circulant matrix.

    Parameters
    ----------
    width : int, default=1
        Number w of pairs of a butterfly and a reversed butterfly, at most 64.
    expansion : int, default=1
        Side of the butterflies ÷ the longer side of `W`; `W` is then a corner of the product.
        Sides with a prime factor above 5 are rounded up. Toeplitz matrices need 2. A butterfly
        may have at most 2²⁴ entries, or 16 times those of `W` if that is more.
    complex_pairs : bool, default=False
        Whether the factors of a real `W` represent complex numbers by 2×2 real blocks. Real
        circulant and Toeplitz matrices need this; it stores four times as many values. Must be
        False when `W` is complex.
    max_iter : int, default=100
        Maximum number of descent steps.
    tol : float, default=1e-3
        Stop when ten steps reduce the squared error by less than this fraction.

    Attributes
    ----------
    patterns_ : list of tuple of int
        The (a, b, c, d) of each factor.
    operator_ : FactorProduct
        The product of the factors and of any paddings.
    factors_ : tuple of Factor
        Its factors.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        ``reconstruction_err_`` ÷ that of magnitude pruning at the same ``nnz_``.
    nnz_ : int
        Stored values.
    density_ : float
        Stored values ÷ entries of `W`; above 1 for small matrices.
    bits_per_weight_ : float
        Bits of the tensors that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        Number of descent steps.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`) and ``seconds``, at the start and after
        each step.
    n_features_in_ : int
        Number of columns of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, if it has any.

    References
    ----------
    - T. Dao, N. Sohoni, A. Gu, M. Eichhorn, A. Blonder, M. Leszczynski, A. Rudra, C. Ré,
      "Kaleidoscope: an efficient, learnable representation for all structured linear maps",
      ICLR 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.linalg import circulant
    >>> from matfact import KaleidoscopeFit
    >>> W = circulant(np.arange(32.0) ** 2)
    >>> bool(KaleidoscopeFit(complex_pairs=True).fit(W).reconstruction_err_ < 1e-13)
    True
    """

    _side_power = 2.0
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "width": [Interval(Integral, 1, MOST_FACTORS, closed="both")],
        "expansion": [Interval(Integral, 1, None, closed="left")],
        "complex_pairs": ["boolean"],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
    }
    _allow_complex: ClassVar[bool] = True

    def __init__(
        self,
        width: int = 1,
        expansion: int = 1,
        complex_pairs: bool = False,
        max_iter: int = 100,
        tol: float = 1e-3,
    ) -> None:
        self.width = width
        self.expansion = expansion
        self.complex_pairs = complex_pairs
        self.max_iter = max_iter
        self.tol = tol

    def _factorize(self, W: Array, history: History) -> Factorization:
        if self.complex_pairs and backend.is_complex(W):
            raise ValueError("complex_pairs must be False when W is complex, got True.")
        n = scipy.fft.next_fast_len(self._length(W.shape), real=True)
        values, n_iter = kaleidoscope(
            W, n, width=self.width, complex_pairs=self.complex_pairs, max_iter=self.max_iter,
            tol=self.tol, callback=history,
        )  # fmt: skip
        factors: list[Factor] = [KroneckerSparseFactor(v) for v in values]
        self.patterns_ = [KroneckerSparseFactor(v).pattern for v in values]
        if W.shape[0] < n:
            factors.insert(0, SelectionFactor.from_index(np.arange(W.shape[0]), n, like=W))
        if W.shape[1] < n:
            factors.append(SelectionFactor.from_index(np.arange(W.shape[1]), n, like=W).T)
        return Factorization(factors, n_iter)

    def _length(self, shape: tuple[int, int]) -> int:
        """Return the side of the butterflies."""
        side, longest = max(shape), math.isqrt(room(shape))
        if side > longest:
            longest = max(math.isqrt(ROOM), PADDING * min(shape))
            raise ValueError(
                f"W must have sides of at most {longest} for butterflies, which are square, got "
                f"{shape[0]}×{shape[1]}."
            )
        if self.expansion > longest // side:
            raise ValueError(
                f"expansion must be at most {longest // side} for a {shape[0]}×{shape[1]} matrix, "
                f"got {self.expansion}."
            )
        return self.expansion * side
