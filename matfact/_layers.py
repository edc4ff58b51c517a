"""Selection of the weights to factorize, and the record of each layer.

In memory a layer is known by its class. A file has only names, shapes and dtypes, so weights of
linear layers and convolutions are recognized by these and by the other tensors of the layer.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matfact._safetensors import TensorSpec

#: Unquantized dtypes, by their names in safetensors files.
FLOATS = ("F16", "BF16", "F32", "F64", "C64")
#: Numbers of axes of the weights of linear layers and of 1-D to 3-D convolutions.
AXES = range(2, 6)

#: Embedding tables look up rows instead of multiplying.
_TABLE = re.compile(
    r"embed|(^|_)emb(s|_|$)|^w[tp]e$|^shared$|^relative_attention_bias$|codebook", re.IGNORECASE
)
_NORM = re.compile(r"norm(?!al)|^ln(_|\d|$)", re.IGNORECASE)


class Kept(NamedTuple):
    """Why a tensor is not factorized.

    Attributes
    ----------
    reason : str
        In words.
    is_guess : bool
        Whether this is inferred from the name only. Requesting the tensor by name overrides it.
    """

    reason: str
    is_guess: bool = False


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer of a compressed network.

    Attributes
    ----------
    layer : str
        Its name.
    kind : str
        Its class before compression.
    rows, columns, groups : int
        Shape of its matrix, and number of such matrices (groups of a convolution).
    method : str
        Class of the factorizer, as ``Quantized(LowRank)`` with that of the quantized one; empty if
        the layer is kept.
    status : {"compressed", "kept", "planned"}
        Outcome. Measures are None unless it is "compressed".
    dense_nbytes, dense_flops : int
        Before compression: bytes of the weight, and operations for one input (one position of an
        image).
    requested_density : float or None
        Requested density; None if the method has no such parameter or used its default.
    density : float or None
        Stored values ÷ entries of the weight.
    relative_error : float or None
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_error : float or None
        Relative error ÷ that of magnitude pruning with as many stored values.
    layer_error : float or None
        Relative error of the layer's outputs on calibration batches that were held out:
        ``‖U − XŴᵀ‖_F / ‖U‖_F``. `X` holds the layer's inputs, with sequential calibration those in
        the compressed network. `U` holds the outputs in the dense network, centred if a bias
        corrects their mean; without feedback it is ``XWᵀ``. None if no batch was held out, for
        instance with a single batch, or if all outputs are zero. Methods that use inputs are refit
        to all batches afterwards.
    fitted_layer_error : float or None
        The same error on the batches used for the fit, usually smaller.
    nbytes : int or None
        Bytes of values and positions in files, with floating-point values in the dtype of the
        layer.
    bits_per_weight : float or None
        Bits of these ÷ entries of the weight.
    flops : int or None
        Operations for one input after compression.
    seconds : float or None
        Wall time of the fit.
    message : str
        Why the layer is kept, or a remark.
    """

    layer: str
    kind: str
    rows: int
    columns: int
    groups: int
    method: str
    status: str
    dense_nbytes: int
    dense_flops: int
    requested_density: float | None = None
    density: float | None = None
    relative_error: float | None = None
    normalized_error: float | None = None
    layer_error: float | None = None
    fitted_layer_error: float | None = None
    nbytes: int | None = None
    bits_per_weight: float | None = None
    flops: int | None = None
    seconds: float | None = None
    message: str = ""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a weight as a matrix: (out, in·kh·kw) for a convolution."""
    return (shape[0], math.prod(shape[1:]))


def kept_tensors(specs: Mapping[str, TensorSpec]) -> dict[str, Kept]:
    """Return the tensors of a network that are not factorized, and why.

    Weights of linear layers and of 1-D to 3-D convolutions are factorized, as in
    :func:`matfact.torch.compress`: tensors named ``weight``, floating-point or complex, with two to
    five axes, in a layer with no other tensor except a bias.

    Parameters
    ----------
    specs : mapping of str to TensorSpec
        All tensors by name; the other tensors of a layer help to recognize its weight.
    """
    ordered = sorted(specs)
    reasons = {name: _reason(name, specs, ordered) for name in specs}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def chosen_weights(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the real matrices of a file to study: weights and embedding tables.

    If no tensor is named like a weight, all matrices are returned.
    """
    real = [
        name for name, spec in specs.items() if is_floating_matrix(spec) and spec.dtype != "C64"
    ]
    if not any(is_weight_name(name) for name in specs):
        return real
    kept = kept_tensors(specs)
    return [name for name in real if name not in kept or kept[name].is_guess]


def is_floating_matrix(spec: TensorSpec) -> bool:
    """Whether a tensor is a matrix of numbers after merging its trailing axes."""
    return spec.dtype in FLOATS and len(spec.shape) in AXES and math.prod(spec.shape) > 0


def is_weight_name(name: str) -> bool:
    """Whether `name` is the name of a layer's weight."""
    return name.rpartition(".")[2] == "weight"


def layer_of(name: str) -> str:
    """Return the layer with weight `name`, "" for the network itself."""
    return name.removesuffix("weight").removesuffix(".")


def _reason(name: str, specs: Mapping[str, TensorSpec], ordered: Sequence[str]) -> Kept | None:
    """Return why a tensor is kept, or None if it is a weight."""
    spec = specs[name]
    if spec.dtype not in FLOATS:
        return Kept(f"dtype {spec.dtype}")
    if not is_floating_matrix(spec):
        return Kept("no matrix and no kernel")
    if not is_weight_name(name):
        return Kept("not named weight")
    if other := _other_in_layer(name, ordered):
        return Kept(f"its layer also holds {other}")
    bias = specs.get(f"{name.removesuffix('weight')}bias")
    widths = {spec.shape[0], spec.shape[-1] if len(spec.shape) == 2 else spec.shape[0]}
    if bias is not None and (len(bias.shape) != 1 or bias.shape[0] not in widths):
        shape = "×".join(map(str, bias.shape)) or "()"
        return Kept(f"its bias has shape {shape}")
    return None if bias is not None else _guess(name, spec)


def _guess(name: str, spec: TensorSpec) -> Kept | None:
    """Return what the name of a layer without bias suggests."""
    layer = next((part for part in reversed(name.split(".")[:-1]) if not part.isdigit()), "")
    if len(spec.shape) == 2 and _TABLE.search(layer):
        return Kept("embeddings, by its name", is_guess=True)
    if _NORM.search(layer):
        return Kept("normalization, by its name", is_guess=True)
    return None


def _other_in_layer(name: str, ordered: Sequence[str]) -> str | None:
    """Return another tensor, not the bias, in the layer with weight `name`, or None.

    Examples are scales and zero points of quantized layers, gains, masks and adapters.
    """
    layer = name.removesuffix("weight")
    own = (name, f"{layer}bias")
    if not layer:  # the layer is the network itself, or names are not paths
        return next((other for other in ordered if "." not in other and other not in own), None)
    start = bisect.bisect_left(ordered, layer)
    inside = (other for other in ordered[start : start + 3] if other.startswith(layer))
    return next((other for other in inside if other not in own), None)
