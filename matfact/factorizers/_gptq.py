"""Rounding with regard to a layer's inputs (GPTQ)."""

from __future__ import annotations

from numbers import Real
from typing import Any, ClassVar, Literal

from sklearn.utils._param_validation import Interval, StrOptions

from matfact.backend import Array
from matfact.calibration import InputStatistics
from matfact.factorizers._base import Factorization
from matfact.factorizers._quantizer import BaseQuantizer
from matfact.solvers._callback import History
from matfact.solvers.gptq import gptq


class GPTQ(BaseQuantizer):
    """Keep every entry, rounded so that the layer's outputs change least.

    Entries are rounded input by input, and what each loses is made up for by the entries of the
    inputs that follow Frantar et al. (2023). Without calibration it is `RoundToNearest`.

    Parameters
    ----------
    bits : int, default=4
        Bits of each entry, from 2 to 8. Scales of 16 bits come on top.
    group_size : int or None, default=64
        Consecutive entries of a row that share a scale, about: each row has its length over
        `group_size` groups, rounded. None means one for each row.
    damping : float, default=0.01
        What is added to the diagonal of the Gram matrix of the inputs, relative to its mean.
    act_order : bool or "auto", default="auto"
        Whether inputs of large second moment are rounded first, with scales of the entries as
        given. Without, scales of a group are fitted once the inputs before it are rounded. "auto"
        does both, and keeps what has the lower error.
    grid : {"fitted", "min_max"}, default="fitted"
        "fitted" takes the ``2**bits`` levels, shared by the whole matrix, and the scales of least
        squared error, with weights that tell how much of it no other input can make up for.
        "min_max" takes evenly spaced levels, as published, and scales by which none is clipped.

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
        ``objective`` (squared error of the outputs of the scaled `W`, damping included, over the
        mean squared norm of the inputs; ``‖W − Ŵ‖_F²`` without calibration) and ``seconds``, one
        entry an iteration.
    n_features_in_ : int
        in_features of `W`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of `W`, where it has any.

    See Also
    --------
    RoundToNearest : Without regard to inputs.
    SparseGPT : The same sweep, for pruning.

    References
    ----------
    - E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate post-training
      quantization for generative pre-trained transformers", ICLR 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from matfact import GPTQ
    >>> rng = np.random.default_rng(0)
    >>> W = rng.standard_normal((32, 64))
    >>> X = rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64))
    >>> model = GPTQ(bits=3).fit(W, calibration=X)
    >>> bool(model.layer_err_ < 0.7 * model.reconstruction_err_)
    True
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseQuantizer._parameter_constraints,
        "damping": [Interval(Real, 0, None, closed="left")],
        "act_order": ["boolean", StrOptions({"auto"})],
    }

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = 64,
        damping: float = 0.01,
        act_order: bool | Literal["auto"] = "auto",
        grid: Literal["fitted", "min_max"] = "fitted",
    ) -> None:
        self.bits = bits
        self.group_size = group_size
        self.damping = damping
        self.act_order = act_order
        self.grid = grid

    def _factorize_calibrated(
        self, W: Array, history: History, calibration: InputStatistics
    ) -> Factorization:
        rounded = gptq(
            W,
            calibration.gram,
            self._bounds(W),
            self.bits,
            damping=float(self.damping),
            act_order=self.act_order,
            min_max=self.grid == "min_max",
        )
        return self._quantized(rounded, history)
