"""The quantizer of `transformers` that writes and reads compressed networks."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer

from matfact.torch.checkpoint._building import built
from matfact.torch.layers._narrowed import narrowed, narrowed_tensors, parsed
from matfact.transformers import _names, _saving
from matfact.transformers._config import METHOD, MatfactConfig
from matfact.transformers._dense import make_dense
from matfact.transformers._layers import PackedLayer, pack, unpack


@register_quantizer(METHOD)
class MatfactQuantizer(HfQuantizer):
    """Writes and reads compressed networks in repositories of `transformers`.

    ``save_pretrained`` and ``from_pretrained`` call it; users do not.

    Attributes
    ----------
    quantization_config : MatfactConfig
        The structure of the network.
    """

    requires_calibration = True
    quantization_config: MatfactConfig
    #: Quantizer of other layers of the network, with which it cannot be saved.
    other: str | None = None
    #: Whether the network loads state dicts with packed layers.
    is_hooked = False

    def is_serializable(self) -> bool:
        """Return True: the network can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: values are parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: values are parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: layers are ordinary modules."""
        return True

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Return the bytes in memory for each byte of a packed layer, else those of an entry."""
        layer = model.get_submodule(param_name.rpartition(".")[0])
        if isinstance(layer, PackedLayer) and param_name.endswith(".weight"):
            itemsize = layer.held[0].weight.element_size()
            return layer.memory(itemsize) / max(1, param.numel())
        return param.element_size()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give `model`, on the meta device, the structure of the compressed network."""
        config = self.quantization_config
        own = _names.tensors(model, config.narrowed)
        widths = parsed(
            {own[name]: shapes for name, shapes in config.narrowed.items() if name in own}
        )
        with narrowed(model, widths):
            _names.keep_precision(model)
            pack(model, config, _names.layers(model, config.layers))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Build the layers from the tensors that have been read."""
        unpack(model)
        return attach(model)

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Make all layers dense in place, as ``model.dequantize()`` of `transformers` does.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The network.
        dtype : torch.dtype, optional
            Of the new weights; by default that of the factors.

        Returns
        -------
        transformers.PreTrainedModel
            `model`, an ordinary network that is saved and loaded without matfact.

        Raises
        ------
        ValueError
            If layers are offloaded, have adapters, or were narrowed by ``prune_neurons``.
        """
        self._check_alone()
        make_dense(model, dtype)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                self.remove_quantization_config(module)
        return model

    def _check_alone(self) -> None:
        """Raise ``ValueError`` if other layers are quantized by others."""
        if self.other is not None:
            raise ValueError(
                f"model must have no layers quantized by others, but {self.other} has some: a "
                "repository has one quantization_config. Use save_network."
            )

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors to save, after checking that they can be loaded again."""
        self._check_alone()
        _saving.check_given(model)
        state, layers = _saving.packed_state(model)
        widths = {name: list(map(list, shapes)) for name, shapes in narrowed_tensors(model).items()}
        config = MatfactConfig(layers=layers, narrowed=widths)
        self.quantization_config = model.config.quantization_config = config
        if not getattr(model, "_hf_peft_config_loaded", False):  # else only adapters are saved
            _names.keep_own(model, layers)
            own = copy.deepcopy(model.config)
            rebuilt = built(lambda: type(model)(own))
            _saving.check_refused(rebuilt, layers)
            MatfactQuantizer(config)._process_model_before_weight_loading(rebuilt)
            _saving.check_reloads(model, state, rebuilt)
        return state, {}


def attach(model: nn.Module) -> nn.Module:
    """Let ``save_pretrained`` of a network write its factorized layers.

    `matfact.torch.compress`, `matfact.torch.prune_neurons` and
    `matfact.torch.load_network` do it by themselves. It is needed only for networks with
    layers of matfact put in by hand.

    Parameters
    ----------
    model : torch.nn.Module
        A network of `transformers`, or one with some inside. It is changed in place.

    Returns
    -------
    torch.nn.Module
        `model`.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            attached: Any = module
            if not isinstance(getattr(module, "hf_quantizer", None), MatfactQuantizer):
                other = getattr(module, "hf_quantizer", None)
                config = getattr(module.config, "quantization_config", None)
                config = config if isinstance(config, MatfactConfig) else MatfactConfig()
                attached.config.quantization_config = config
                attached.hf_quantizer = MatfactQuantizer(config)
                if getattr(other, "packed_modules", None) != {}:  # GGUF files may be read as dense
                    attached.hf_quantizer.other = other and type(other).__name__
            if not attached.hf_quantizer.is_hooked:  # from_pretrained sets only the quantizer
                attached.hf_quantizer.is_hooked = True
                module.register_load_state_dict_pre_hook(_saving.expand_packed)
            # Layers are ordinary modules: half(), float() and training work as in any network.
            attached.is_quantized = False
    return model
