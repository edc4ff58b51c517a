"""Initialization of values and supports."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import nn

from matfact.operators import Factor, SparseFactor
from matfact.torch.layers._coded import refuse_codes
from matfact.torch.layers._factors import SparseFactorModule
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.running._offloaded import refuse_offloaded
from matfact.torch.running._tensors import outside_inference_mode


def reset_parameters(model: nn.Module, *, random_state: Any = None) -> nn.Module:
    """Initialize the values of all factorized layers in `model`, keeping their supports.

    The first factor of a product follows He et al., the others Glorot and Bengio, with the number
    of connections of each neuron in the support instead of the width (Giffon et al., 2021). Outputs
    then have about the variance of a dense layer initialized by He et al. Biases are set to zero.

    Parameters
    ----------
    model : torch.nn.Module
        A factorized layer, or a network that contains some; not with quantized values or signs.
    random_state : int, RandomState or None, default=None
        Seed of the values.

    Returns
    -------
    torch.nn.Module
        `model`, changed in place.

    References
    ----------
    - L. Giffon, S. Ayache, H. Kadri, T. Artières, R. Sicre, "PSM-nets: compressing neural
      networks with product of sparse matrices", IJCNN 2021.
    """
    refuse_codes(model, "to be initialized")
    refuse_offloaded(model)
    rng = check_random_state(random_state)
    for layer in _layers(model):
        factors = [factor for factor in layer.chain if factor.values.numel()]
        for i, factor in enumerate(factors):
            variance = _variance(factor.to_factor(), first=i == 0)
            values = rng.standard_normal(variance.shape) * np.sqrt(variance)
            with torch.no_grad():
                factor.values.copy_(torch.from_numpy(values))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


def _variance(factor: Factor, first: bool) -> np.ndarray:
    """Return the variance of each value."""
    rows, columns = np.divmod(factor.locations, factor.shape[1])
    fan_in = np.bincount(rows)[rows]
    fan_out = np.bincount(columns)[columns]
    variance = 2.0 / fan_in if first else 2.0 / (fan_in + fan_out)
    return variance.reshape(tuple(factor.values.shape))


@outside_inference_mode
def randomize_supports(model: nn.Module, *, random_state: Any = None) -> nn.Module:
    """Give all sparse factors in `model` random supports of the same size and new values.

    Parameters
    ----------
    model : torch.nn.Module
        A factorized layer, or a network that contains some; not with quantized values or signs.
    random_state : int, RandomState or None, default=None
        Seed of supports and values.

    Returns
    -------
    torch.nn.Module
        `model`, changed in place.
    """
    refuse_codes(model, "to get new supports")
    refuse_offloaded(model)
    rng = check_random_state(random_state)
    for layer in _layers(model):
        for i, factor in enumerate(layer.factors):
            if isinstance(factor, SparseFactorModule):
                shape, nnz = (factor.rows, factor.columns), factor.values.numel()
                support = random_support(shape, nnz, rng)
                values = factor.values.detach()
                like = SparseFactor.from_dense(support.astype(np.float64)).with_values(values)
                layer.factors[i] = SparseFactorModule(like)
    return reset_parameters(model, random_state=rng)


def random_support(shape: tuple[int, int], nnz: int, rng: np.random.RandomState) -> np.ndarray:
    """Return a random mask with `nnz` entries and as few empty rows and columns as possible.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns.
    nnz : int
        Entries to keep.
    rng : RandomState
        Random number generator.

    Returns
    -------
    ndarray of bool
        The mask.
    """
    mask = np.zeros(shape, dtype=bool)
    diagonals = max(shape)  # wrapped diagonals, with one entry per row and column
    rows = rng.permutation(shape[0])[np.arange(diagonals) % shape[0]]
    columns = rng.permutation(shape[1])[np.arange(diagonals) % shape[1]]
    mask[rows[:nnz], columns[:nnz]] = True
    free = np.flatnonzero(~mask)
    mask.reshape(-1)[rng.choice(free, nnz - np.count_nonzero(mask), replace=False)] = True
    return mask


def _layers(model: nn.Module) -> list[FactorizedLinear]:
    return [module for module in model.modules() if isinstance(module, FactorizedLinear)]
