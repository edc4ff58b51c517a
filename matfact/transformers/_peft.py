"""LoRA of the `peft` package on factorized linear layers."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from matfact.torch.layers._coded import is_coded
from matfact.torch.layers._factors import FactorModule
from matfact.torch.layers.conv import FactorizedConv
from matfact.torch.layers.linear import FactorizedLinear
from matfact.torch.training.adapters import on_support, places_of, refuse_adapted

#: Values of ``init_lora_weights`` that do not read the dense weight of a layer.
_INITS = (True, False, "gaussian")


def lora_config(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Make a configuration of `peft` adapt the factorized linear layers of a network.

    Layers of floating-point values get adapters on their supports, as those of
    `matfact.torch.add_adapters`: a pair ``A``, ``B`` holds a part for each factor, side by
    side, and only entries of its products on the support of that factor are added. Merging is
    lossless. Layers that store codes of few bits get an ordinary adapter beside them, which cannot
    be merged.

    Parameters
    ----------
    model : torch.nn.Module
        The network to adapt, which is not changed.
    config : peft.LoraConfig
        The configuration, of any targets, changed in place. "all-linear" becomes an expression for
        the dense and factorized linear layers except the output layer, and `peft` is told of the
        factorized ones. It does not store that, so a configuration that was loaded needs it again.

    Returns
    -------
    peft.LoraConfig
        `config`, for `get_peft_model`, `add_adapter` or `PeftModel.from_pretrained`.

    Raises
    ------
    ValueError
        If `config` asks for a variant of LoRA that needs a dense weight, or `model` has adapters of
        `matfact.torch.add_adapters`.

    Examples
    --------
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from matfact.torch import SparseProductLinear
    >>> model = nn.Sequential(SparseProductLinear(64, 64, density=0.25, random_state=0))
    >>> config = lora_config(model, LoraConfig(r=2, target_modules="all-linear"))
    >>> adapted = get_peft_model(model, config)
    >>> adapted.merge_and_unload()[0].to_product().density
    0.25
    """
    _check_config(config)
    refuse_adapted(model)
    config._register_custom_module({FactorizedLinear: LoraFactorizedLinear})
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config.target_modules = _all_linear(model, config.task_type)
    return config


def _check_config(config: LoraConfig) -> None:
    """Raise ``ValueError`` for variants of LoRA that need a dense weight."""
    if not any(config.init_lora_weights is each for each in _INITS[:2]) and (
        config.init_lora_weights not in _INITS[2:]
    ):
        raise ValueError(
            "config.init_lora_weights must be True, False or 'gaussian' for factorized layers, got "
            f"{config.init_lora_weights!r}, which reads the dense weight."
        )
    if config.lora_bias:
        raise ValueError("config.lora_bias must be False for factorized layers, got True.")
    if config.use_dora:
        raise ValueError(
            "config.use_dora must be False for factorized layers, got True: norms of columns of "
            "the dense weight are not those of its factors."
        )


def _all_linear(model: Any, task: str | None) -> str:
    """Return an expression for the layers that `peft` would choose if it knew factorized ones.

    A list of names would also match the ends of longer ones, such as those of factors.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    heads = [getattr(model, "get_output_embeddings", lambda: None)()]
    if heads == [None] and task == TaskType.SEQ_CLS:
        heads = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    modules = dict(model.named_modules())
    whole = (BaseTunerLayer, FactorizedConv)  # which are targets, or not, with what they hold
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, whole))
    return "|".join(
        re.escape(name)
        for name, module in modules.items()
        if name and _is_linear(module) and module not in heads and not name.startswith(inside)
    )


def _is_linear(module: nn.Module) -> bool:
    # Layers with adapters have no common class: `peft` goes by their names too.
    is_adapted = isinstance(module, BaseTunerLayer) and "Linear" in type(module).__name__
    return is_adapted or isinstance(module, (nn.Linear, Conv1D, FactorizedLinear))


class LoraFactorizedLinear(nn.Module, LoraLayer):
    """Factorized linear layer with adapters, made by `peft` (see `lora_config`).

    ``lora_A`` and ``lora_B`` of an adapter hold the parts of all factors side by side, so that what
    `peft` does with the pair of a dense layer (saving, initializing, weighted sums) holds here too.
    """

    def __init__(
        self,
        base_layer: FactorizedLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: int,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self._originals: list[Tensor] = []  # values before merging, to restore them exactly
        self._locate()
        self.register_load_state_dict_post_hook(_relocate)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter, after a check of `config`."""
        _check_config(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Return the widths of the pair: of the layer, or of its factors side by side."""
        layer = cast(FactorizedLinear, module)
        if not _is_merged_into(layer):
            return layer.in_features, layer.out_features
        factors = _trained(layer).values()
        return sum(factor.columns for factor in factors), sum(factor.rows for factor in factors)

    @property
    def _layer(self) -> FactorizedLinear:
        return cast(FactorizedLinear, self.get_base_layer())

    def _locate(self) -> None:
        """Store the position of each value, which loading may have changed."""
        if _is_merged_into(self._layer):
            for i, factor in _trained(self._layer).items():
                self.register_buffer(f"places_{i}", places_of(factor), persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer with the active adapters."""
        if kwargs:
            raise ValueError(
                f"Factorized layers take the same adapters for the whole batch, got {min(kwargs)}."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return self._layer(x)
        if not _is_merged_into(self._layer):
            return self._layer(x) + sum(self._beside(name, x) for name in active)
        trained = _trained(self._layer)
        for i, factor in reversed([*enumerate(self._layer.chain)]):
            x = self._through(i, factor, x, active) if i in trained else factor(x)
        return x if self._layer.bias is None else x + self._layer.bias.to(x.dtype)

    def _beside(self, name: str, x: Tensor) -> Tensor:
        """Return the output of an adapter that is not part of the factors."""
        low = self.lora_A[name](self.lora_dropout[name](x).to(self.lora_A[name].weight.dtype))
        return (self.lora_B[name](low) * self.scaling[name]).to(x.dtype)

    def _through(self, i: int, factor: FactorModule, x: Tensor, active: list[str]) -> Tensor:
        """Apply a factor with adapters.

        Changes are added to the values if nothing is rounded or dropped by that, which is faster.
        """
        if factor.values.is_meta and not x.is_meta:
            raise ValueError(
                "Adapters on supports need the values in memory, but those of a layer are "
                "offloaded or were never loaded."
            )
        values: Tensor = factor.values
        beside: list[Tensor] = []
        for name in active:
            change, dropout = self._change(name, i), self.lora_dropout[name]
            if isinstance(dropout, nn.Identity) and change.dtype == values.dtype:
                values = values + change
            else:
                change = change.to(factor.values.dtype)
                beside.append(functional_call(factor, {"values": change}, (dropout(x),)))
        out = functional_call(factor, {"values": values}, (x,))
        return sum(beside, start=out)

    def _change(self, name: str, i: int) -> Tensor:
        """Return what an adapter adds to the values of factor `i`."""
        row, column = 0, 0
        for j, factor in _trained(self._layer).items():
            if j == i:
                break
            row, column = row + factor.rows, column + factor.columns
        factor = self._layer.chain[i]
        B, A = (cast(nn.Linear, pair[name]).weight for pair in (self.lora_B, self.lora_A))
        left = B[row : row + factor.rows] * self.scaling[name]
        right = A[:, column : column + factor.columns]
        if left.device.type == "cpu":  # where products of fewer bits are slow, or missing
            wide = torch.promote_types(left.dtype, torch.float32)
            left, right = left.to(wide), right.to(wide)
        places = self.get_buffer(f"places_{i}")
        return on_support(left, right, places).reshape(factor.values.shape)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the values on the supports, as ``merge_adapters`` does."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        factors = self._to_merge_into()
        changes = {i: sum(self._change(name, i) for name in names) for i in factors}
        merged = {
            i: (factor.values + changes[i]).to(factor.values) for i, factor in factors.items()
        }
        for i, values in merged.items():
            if safe_merge and not torch.isfinite(values).all():
                raise ValueError(f"adapters {names} make values of factor {i} that are not finite.")
        if not self.merged:
            self._originals = [factor.values.detach().clone() for factor in factors.values()]
        for i, factor in factors.items():
            factor.values.copy_(merged[i])
        self.merged_adapters.extend(names)

    def _to_merge_into(self) -> dict[int, Any]:
        """Return the factors to merge into, or raise ``ValueError``."""
        if not _is_merged_into(self._layer):
            raise ValueError(
                "Adapters cannot be merged into a layer that stores codes of few bits: keep them "
                "beside it. Layers before it may be merged already: unmerge_adapter() undoes "
                "merge_adapter(); after merge_and_unload(), load the network again."
            )
        factors = _trained(self._layer)
        if any(factor.values.is_meta for factor in factors.values()):
            raise ValueError(
                "Adapters can only be merged into values in memory, but those of a layer are "
                "offloaded or were never loaded."
            )
        return factors

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the values from before merging, to the bit."""
        for factor, values in zip(self._to_merge_into().values(), self._originals, strict=False):
            factor.values.copy_(values)
        self._originals, self.merged_adapters = [], []


def _relocate(layer: LoraFactorizedLinear, _: Any) -> None:
    layer._locate()


def _trained(layer: FactorizedLinear) -> dict[int, Any]:
    """Return the factors with values, by position."""
    return {i: factor for i, factor in enumerate(layer.chain) if factor.trained}


def _is_merged_into(layer: FactorizedLinear) -> bool:
    """Whether adapters are part of the factors, and not beside the layer."""
    return bool(_trained(layer)) and not any(is_coded(factor) for factor in layer.chain)
