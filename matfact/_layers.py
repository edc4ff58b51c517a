"""Which weights of a network are factorized, why others are not, and the record of each layer.

In memory a layer is known by its class. A file has names, shapes and dtypes, so that what is no
weight of a linear layer or a convolution is told by these, and by what else its layer holds.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matfact._safetensors import TensorSpec

#: Dtypes, by their names in safetensors files, whose numbers are the values themselves.
FLOATS = ("F16", "BF16", "F32", "F64", "C64")
#: Axes of the weights of linear layers, and of convolutions in one to three dimensions.
AXES = range(2, 6)

#: Tables look up rows instead of multiplying.
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
        Whether only the name says so. A user who asks for the tensor by name overrides it.
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
        Its class before.
    rows, columns, groups : int
        Shape of its matrix, and how many such it has (groups of a convolution).
    method : str
        Class of the factorizer; empty where the layer is kept.
    status : {"compressed", "kept", "planned"}
        What became of it. Measures are None unless it is compressed.
    dense_nbytes, dense_flops : int
        Bytes of its weight before, and operations for one input (one position of an image).
    requested_density : float or None
        Density asked for; None where the method has no such parameter or its default was taken.
    density : float or None
        Stored values ÷ entries of the weight.
    relative_error : float or None
        ``‖W − Ŵ‖_F / ‖W‖_F``.
    normalized_error : float or None
        Relative error ÷ that of magnitude pruning with as many stored values.
    layer_error : float or None
        How far the layer's outputs are from those it has in the dense network, relative to these,
        for calibration batches that were kept aside: ``‖U − XŴᵀ‖_F / ‖U‖_F`` with the inputs `X`,
        which with sequential calibration are those in the compressed network, and the outputs `U`,
        less their means where a bias makes up for them. Without feedback `U` is ``XWᵀ``. None
        where no input was kept aside, as of a single batch, or all outputs are zero. Methods that
        use inputs themselves are fitted to all batches after it was measured.
    fitted_layer_error : float or None
        The same for the batches that the layer was fitted to, which is mostly less.
    nbytes : int or None
        Bytes of values and positions, in the smaller of CSR and bit masks.
    flops : int or None
        Operations for one input after.
    seconds : float or None
        Wall time of the fit.
    message : str
        Why the layer is kept, or what is to be known about it.
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
    flops: int | None = None
    seconds: float | None = None
    message: str = ""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a weight as a matrix: (out, in·kh·kw) for a convolution."""
    return (shape[0], math.prod(shape[1:]))


def kept_tensors(specs: Mapping[str, TensorSpec]) -> dict[str, Kept]:
    """Return the tensors of a network that are no weights to be factorized, and why.

    Weights are those of linear layers and of convolutions in one to three dimensions, as
    :func:`matfact.torch.compress` takes them: named ``weight``, floating-point or complex, of two
    to five axes, in a layer that holds nothing but them and a bias.

    Parameters
    ----------
    specs : mapping of str to TensorSpec
        All tensors by name: the others in a layer tell what its weight is.
    """
    ordered = sorted(specs)
    reasons = {name: _reason(name, specs, ordered) for name in specs}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def chosen_weights(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the real matrices of a file that are worth a study: weights, and tables of numbers.

    If no tensor is named as a weight, the file follows no convention, and all matrices are taken.
    """
    real = [
        name for name, spec in specs.items() if is_floating_matrix(spec) and spec.dtype != "C64"
    ]
    if not any(is_weight_name(name) for name in specs):
        return real
    kept = kept_tensors(specs)
    return [name for name in real if name not in kept or kept[name].is_guess]


def is_floating_matrix(spec: TensorSpec) -> bool:
    """Whether a tensor can be seen as a matrix of numbers, its trailing axes taken together."""
    return spec.dtype in FLOATS and len(spec.shape) in AXES and math.prod(spec.shape) > 0


def is_weight_name(name: str) -> bool:
    """Whether `name` is that of the weight of a layer."""
    return name.rpartition(".")[2] == "weight"


def layer_of(name: str) -> str:
    """Return the layer whose weight is `name`, "" for the network itself."""
    return name.removesuffix("weight").removesuffix(".")


def _reason(name: str, specs: Mapping[str, TensorSpec], ordered: Sequence[str]) -> Kept | None:
    """Return why one tensor is kept, None where it is a weight."""
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
    """Return what the name of a layer without bias tells."""
    layer = next((part for part in reversed(name.split(".")[:-1]) if not part.isdigit()), "")
    if len(spec.shape) == 2 and _TABLE.search(layer):
        return Kept("embeddings, by its name", is_guess=True)
    if _NORM.search(layer):
        return Kept("normalization, by its name", is_guess=True)
    return None


def _other_in_layer(name: str, ordered: Sequence[str]) -> str | None:
    """Return a tensor, other than the bias, in the layer whose weight is `name`, if there is one.

    Scales and zero points of quantized layers, gains, masks and adapters are such.
    """
    layer = name.removesuffix("weight")
    own = (name, f"{layer}bias")
    if not layer:  # the layer is the network itself, or the names are no paths
        return next((other for other in ordered if "." not in other and other not in own), None)
    start = bisect.bisect_left(ordered, layer)
    inside = (other for other in ordered[start : start + 3] if other.startswith(layer))
    return next((other for other in inside if other not in own), None)
