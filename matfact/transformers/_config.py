"""The structure of a compressed network, as ``config.json`` holds it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from matfact._safetensors import is_sizes
from matfact._text import printable
from matfact.checkpoint._packed import METHOD, VERSION
from matfact.operators._encoding import LARGEST_SIDE, STORAGES
from matfact.operators._quantized import BITS
from matfact.torch.layers._narrowed import parsed

#: Which matrices products are of: of the layers, or of their weights as they are stored, which some
#: layers transpose.
LAYOUTS = ("out, in", "stored")
#: Bounds on what a file may describe.
_MOST_LAYERS, _MOST_FACTORS, _LONGEST_NAME = 1 << 20, 1 << 12, 1 << 10

#: Factors of each product of a layer: kind, shape, number of values and bits.
Factors = list[list[dict[str, Any]]]


@register_quantization_config(METHOD)
class MatfactConfig(QuantizationConfigMixin):
    """Entry ``quantization_config`` of the configuration of a compressed network.

    It is made by `attach` and completed by ``save_pretrained``; nothing needs to be set.

    Parameters
    ----------
    version : int, default=1
        Version of this entry.
    layers : mapping of str to mapping, optional
        The factorized layers by name. ``factors`` lists for each product (one per group of a
        convolution) its factors: ``kind`` of storage, ``shape``, number of stored ``values``, and
        their ``bits`` if they are quantized. ``nbytes`` is the size of the layer's tensor.
    layout : {"out, in", "stored"}, default="out, in"
        Whether products are of matrices (outputs, inputs), or of weights as layers store them, some
        transposed.
    narrowed : mapping of str to list, optional
        Shapes of the tensors of pruned units, in the full network and here.
    **others
        Members of later releases, which are ignored.

    Raises
    ------
    ValueError
        If an entry is invalid; the message names it.
    """

    def __init__(
        self,
        version: int = VERSION,
        layers: Mapping[str, Any] | None = None,
        layout: str = LAYOUTS[0],
        narrowed: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        if type(version) is not int or not 1 <= version <= VERSION:
            raise _refusal("version", f"must be 1 to {VERSION}, got {version!r:.80}")
        if layout not in LAYOUTS:
            raise _refusal("layout", f"must be one of {LAYOUTS}, got {layout!r:.80}")
        self.version, self.layout = version, layout
        self.layers: dict[str, Any] = {} if layers is None else _checked_layers(layers)
        self.narrowed: dict[str, Any] = {} if narrowed is None else _checked_widths(narrowed)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON represents it."""
        return copy.deepcopy(vars(self))


def _checked_layers(layers: Any) -> dict[str, Any]:
    if not isinstance(layers, Mapping) or len(layers) > _MOST_LAYERS:
        raise _refusal("layers", f"must be an object of up to {_MOST_LAYERS} members")
    return {name: _checked_layer(name, entry) for name, entry in layers.items()}


def _checked_layer(name: Any, entry: Any) -> dict[str, Any]:
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
        raise _refusal("layers", f"must be named by 1 to {_LONGEST_NAME} characters")
    where = f"layers[{printable(name)!r:.200}]"
    if not isinstance(entry, Mapping):
        raise _refusal(where, "must be an object")
    nbytes, factors = entry.get("nbytes"), entry.get("factors")
    if not is_sizes([nbytes]):
        raise _refusal(f"{where}.nbytes", f"must be a size, got {nbytes!r:.80}")
    if not isinstance(factors, list) or not 0 < len(factors) <= LARGEST_SIDE:
        raise _refusal(f"{where}.factors", "must be a list of products")
    checked = [_checked_product(f"{where}.factors[{i}]", p) for i, p in enumerate(factors)]
    if len({product_shape(product) for product in checked}) > 1:
        raise _refusal(f"{where}.factors", "must hold products of one shape")
    return {"factors": checked, "nbytes": nbytes}


def _checked_product(where: str, product: Any) -> list[dict[str, Any]]:
    if not isinstance(product, list) or not 0 < len(product) <= _MOST_FACTORS:
        raise _refusal(where, f"must be a list of 1 to {_MOST_FACTORS} factors")
    checked = [_checked_factor(f"{where}[{i}]", factor) for i, factor in enumerate(product)]
    for i, (left, right) in enumerate(itertools.pairwise(checked)):
        if left["shape"][1] != right["shape"][0]:
            raise _refusal(f"{where}[{i}].shape", f"must fit the next factor, {right['shape']}")
    return checked


def _checked_factor(where: str, factor: Any) -> dict[str, Any]:
    kind: Any
    shape: Any
    values: Any
    if not isinstance(factor, Mapping):
        raise _refusal(where, "must be an object")
    kind, shape, values = factor.get("kind"), factor.get("shape"), factor.get("values")
    if not isinstance(kind, str) or kind not in STORAGES:
        raise _refusal(f"{where}.kind", f"must be one of {', '.join(STORAGES)}, got {kind!r:.80}")
    if not is_sizes(shape) or len(shape) != 2 or not 0 < max(shape) <= LARGEST_SIDE:
        raise _refusal(f"{where}.shape", f"must be two sizes up to {LARGEST_SIDE}")
    if not is_sizes([values]) or values > math.prod(shape):
        raise _refusal(f"{where}.values", f"must be a number up to that of entries of {shape}")
    bits = factor.get("bits")
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise _refusal(f"{where}.bits", f"must be 2 to 8, got {bits!r:.80}")
    known = {"kind": kind, "shape": list(shape), "values": values}
    return known if bits is None else known | {"bits": bits}


def _checked_widths(narrowed: Any) -> dict[str, Any]:
    try:
        widths = parsed(narrowed)
    except ValueError:
        raise _refusal("narrowed", "must map names to the shapes before and after") from None
    return {name: [list(full), list(kept)] for name, (full, kept) in widths.items()}


def product_shape(product: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the shape of a product of described factors."""
    return product[0]["shape"][0], product[-1]["shape"][1]


def _refusal(where: str, problem: str) -> ValueError:
    return ValueError(f"quantization_config.{where} in config.json {problem}.")
