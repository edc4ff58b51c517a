"""Low-rank adapters restricted to the supports, which merge without loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn

from matfact.torch.layers._coded import refuse_codes
from matfact.torch.layers._factors import (
    BlockFactorModule,
    DenseFactorModule,
    FactorModule,
    KroneckerFactorModule,
    SparseFactorModule,
)
from matfact.torch.running._offloaded import refuse_offloaded
from matfact.torch.running._tensors import check_trainable, outside_inference_mode


class _Adapted(FactorModule):
    """Mixin of adapted factors: values are the original ones plus an update."""

    base: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter
    places: Tensor

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The original values plus the entries of ``left @ right`` on the support."""
        return self.base + on_support(self.left, self.right, self.places).reshape(self.base.shape)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.places = places_of(self)  # of the loaded support


class _AdaptedDense(_Adapted, DenseFactorModule): ...


class _AdaptedSparse(_Adapted, SparseFactorModule): ...


class _AdaptedKronecker(_Adapted, KroneckerFactorModule): ...


class _AdaptedBlock(_Adapted, BlockFactorModule): ...


# Module-level classes, so that networks with adapters can be pickled.
_CLASSES: dict[type[FactorModule], type[_Adapted]] = {
    DenseFactorModule: _AdaptedDense,
    SparseFactorModule: _AdaptedSparse,
    KroneckerFactorModule: _AdaptedKronecker,
    BlockFactorModule: _AdaptedBlock,
}


@outside_inference_mode
def add_adapters(model: nn.Module, rank: int, *, random_state: Any = None) -> list[nn.Parameter]:
    """Add a low-rank adapter to every factor of every compressed layer.

    LoRA (Hu et al., 2022) on a support: the part of a low-rank update outside of the support,
    usually most of it, could not be merged into a sparse matrix, so only entries on the support are
    added. The network's outputs do not change until training.

    Parameters
    ----------
    model : torch.nn.Module
        A network with compressed layers, changed in place. Its other parameters are frozen. Layers
        of quantized values or signs cannot be adapted: train their scales instead.
    rank : int
        Rank of the update of each factor, limited by its shorter side.
    random_state : int, RandomState or None, default=None
        Seed of one side of each update; the other starts at zero.

    Returns
    -------
    list of torch.nn.Parameter
        The parameters to train.

    References
    ----------
    - E. J. Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch import SparseProductLinear, add_adapters, merge_adapters
    >>> model = torch.nn.Sequential(SparseProductLinear(64, 64, density=0.25, random_state=0))
    >>> [tuple(parameter.shape) for parameter in add_adapters(model, rank=2, random_state=0)]
    [(64, 2), (2, 64), (64, 2), (2, 64)]
    >>> merge_adapters(model)[0].to_product().density
    0.25
    """
    check_trainable(model)
    refuse_offloaded(model)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    factors = [m for m in model.modules() if isinstance(m, FactorModule) and m.trained]
    if not factors:
        raise ValueError("model must have compressed layers to adapt, got none.")
    refuse_adapted(model)
    refuse_codes(model, "to merge adapters into")
    rng = check_random_state(random_state)
    _freeze(model)
    return [adapter for factor in factors for adapter in _adapt(factor, rank, rng)]


@outside_inference_mode
def merge_adapters(model: nn.Module) -> nn.Module:
    """Add the adapters of `add_adapters` to the values, and remove them.

    Parameters
    ----------
    model : torch.nn.Module
        The network, changed in place. Its outputs do not change, and parameters are unfrozen unless
        they were frozen before.
    """
    for module in model.modules():
        if isinstance(module, _Adapted):
            _merge(module)
    _thaw(model)
    return model


def refuse_adapted(model: nn.Module) -> None:
    """Raise ``ValueError`` if `model` has adapters."""
    if any(isinstance(module, _Adapted) for module in model.modules()):
        raise ValueError("model must have no adapters yet: merge them first.")


def _adapt(factor: Any, rank: int, rng: np.random.RandomState) -> list[nn.Parameter]:
    """Turn `factor` into an adapted one, and return its trainable parameters."""
    base, places = factor.values, places_of(factor)
    rank = min(rank, factor.rows, factor.columns)
    right = rng.standard_normal((rank, factor.columns)) / np.sqrt(factor.columns)
    del factor.values
    factor.base = base
    factor.left = nn.Parameter(base.new_zeros(factor.rows, rank))
    factor.right = nn.Parameter(base.new_tensor(right))
    factor.register_buffer("places", places, persistent=False)
    factor.__class__ = _CLASSES[type(factor)]
    return [factor.left, factor.right]


def on_support(left: Tensor, right: Tensor, places: Tensor) -> Tensor:
    """Return the entries of ``left @ right`` at `places`."""
    return (left @ right).flatten()[places]


def places_of(factor: FactorModule) -> Tensor:
    """Return the positions of the values of `factor` in the flattened matrix."""
    return torch.as_tensor(np.ravel(factor.to_factor().locations), device=factor.values.device)


@torch.no_grad()
def _merge(factor: Any) -> None:
    merged = factor.base.copy_(factor.values)
    del factor.base, factor.left, factor.right, factor.places
    factor.__class__ = type(factor).__bases__[1]
    factor.values = merged


#: Attribute of a module: names of parameters that were frozen before adapters were added.
_FROZEN = "_frozen_before_adapters"


def _freeze(model: nn.Module) -> None:
    """Freeze all parameters, and record those that were already frozen."""
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        vars(module)[_FROZEN] = [name for name, parameter in own if parameter in frozen]
    model.requires_grad_(False)


def _thaw(model: nn.Module) -> None:
    """Unfreeze the parameters that were trainable before `_freeze`."""
    for module in model.modules():
        frozen = vars(module).pop(_FROZEN, ())
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(name not in frozen)
