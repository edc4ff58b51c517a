"""Rounding to nearest, the baseline of every quantizer."""

from __future__ import annotations

from typing import Literal

from matfact import backend
from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._base import Factorization
from matfact.factorizers._quantizer import BaseQuantizer
from matfact.solvers._callback import History
from matfact.solvers.layerwise import input_norms


class RoundToNearest(BaseQuantizer):
    """Keep every entry, rounded to the nearest of a few levels.

    What factors of few values have to beat at the same number of bytes. Levels and scales are
    fitted, so that rounding loses a fifth to a third less than with the usual even levels between
    the extremes of each group. With calibration errors count by the mean square of the input they
    are multiplied by, and rounding is still to the nearest level; `GPTQ` loses far less of
    the outputs then.

    Parameters
    ----------
    bits : int, default=4
        Bits of each entry, from 2 to 8. Scales of 16 bits come on top.
    group_size : int or None, default=64
        Consecutive entries of a row that share a scale, about: each row has its length over
        `group_size` groups, rounded. None means one for each row.
    grid : {"fitted", "min_max"}, default="fitted"
        "fitted" takes the ``2**bits`` levels, shared by the whole matrix, and the scales of least
        squared error. "min_max" takes evenly spaced levels, as many publications do, and scales
        by which none is clipped.

    Attributes
    ----------
    operator_ : FactorProduct
        The rounded matrix, one factor of quantized values.
    factors_ : tuple of Factor
        Its factors.
    reconstruction_err_ : float
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_err_ : float
        Infinite, or 0 where nothing was lost: magnitude pruning loses nothing with all values.
    layer_err_ : float
        ``‖XWᵀ − XŴᵀ‖_F / ‖XWᵀ‖_F`` for the calibration inputs `X`; only with calibration.
    nnz_ : int
        Stored values, all of `W`.
    density_ : float
        1.
    bits_per_weight_ : float
        Bits of the tensors that ``operator_.save`` writes ÷ entries of `W`.
    n_iter_ : int
        1.
    history_ : dict of list
        ``objective`` (``‖W − Ŵ‖_F²`` of the scaled `W`, weighted with calibration) and
        ``seconds``, one entry an iteration.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    See Also
    --------
    GPTQ : With regard to the layer's inputs.

    References
    ----------
    - S. P. Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information
      Theory, 1982.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import RoundToNearest
    >>> W = np.random.default_rng(0).standard_normal((64, 128))
    >>> errors = [RoundToNearest(bits).fit(W).reconstruction_err_ for bits in (2, 4, 8)]
    >>> bool(errors[0] < 0.4), bool(errors[1] < 0.1), bool(errors[2] < 0.01)
    (True, True, True)
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = 64,
        grid: Literal["fitted", "min_max"] = "fitted",
    ) -> None:
        self.bits = bits
        self.group_size = group_size
        self.grid = grid

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        norms = backend.to_numpy(input_norms(calibration.gram))
        return self._nearest(W, history, norms**2)
