"""Values and supports to start training from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import nn

from matfact.operators import Factor, SparseFactor
from matfact.torch.layers._factors import SparseFactorModule
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.running._tensors import outside_inference_mode


def reset_parameters(model: nn.Module, *, random_state: Any = None) -> nn.Module:
    """Draw the values of every factorized layer in `model` anew, on the supports they have.

    The first factor of a product is drawn as He et al. do, the others as Glorot and Bengio do,
    with the connections that the support leaves each neuron in place of the widths [1]_. Outputs
    then vary about as much as those of a dense layer drawn as He et al. do. Biases become zero.

    Parameters
    ----------
    model : torch.nn.Module
        A factorized layer or a network of such.
    random_state : int, RandomState or None, default=None
        Draws the values.

    Returns
    -------
    torch.nn.Module
        `model`, changed in place.

    References
    ----------
    .. [1] L. Giffon, S. Ayache, H. Kadri, T. Artières, R. Sicre, "PSM-nets: compressing neural
       networks with product of sparse matrices", IJCNN 2021.
    """
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
    """Return the variance to draw each value with."""
    rows, columns = np.divmod(factor.locations, factor.shape[1])
    fan_in = np.bincount(rows)[rows]
    fan_out = np.bincount(columns)[columns]
    variance = 2.0 / fan_in if first else 2.0 / (fan_in + fan_out)
    return variance.reshape(tuple(factor.values.shape))


@outside_inference_mode
def randomize_supports(model: nn.Module, *, random_state: Any = None) -> nn.Module:
    """Give every sparse factor in `model` a random support of the same size, and new values.

    Parameters
    ----------
    model : torch.nn.Module
        A factorized layer or a network of such.
    random_state : int, RandomState or None, default=None
        Draws supports and values.

    Returns
    -------
    torch.nn.Module
        `model`, changed in place.
    """
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
    """Return a mask of `nnz` entries that leaves as few rows and columns empty as it can.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns.
    nnz : int
        Entries to keep.
    rng : RandomState
        Draws the entries.

    Returns
    -------
    ndarray of bool
        The mask.
    """
    mask = np.zeros(shape, dtype=bool)
    diagonals = max(shape)  # one entry in each row and column, wrapped around
    rows = rng.permutation(shape[0])[np.arange(diagonals) % shape[0]]
    columns = rng.permutation(shape[1])[np.arange(diagonals) % shape[1]]
    mask[rows[:nnz], columns[:nnz]] = True
    free = np.flatnonzero(~mask)
    mask.reshape(-1)[rng.choice(free, nnz - np.count_nonzero(mask), replace=False)] = True
    return mask


def _layers(model: nn.Module) -> list[FactorizedLinear]:
    return [module for module in model.modules() if isinstance(module, FactorizedLinear)]
