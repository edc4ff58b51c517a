"""Selection of the weights to factorize, and the record of each layer.

One rule, `reason_to_keep`, decides from the known properties of a weight. A file has only
names, shapes and dtypes; of a network in memory, more is known
(`matfact.torch.layers._matricized`).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from matfact._safetensors import TensorSpec, array_dtype

#: Unquantized dtypes.
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
#: Numbers of axes of the weights of linear layers and of 1-D to 3-D convolutions.
AXES = range(2, 6)

#: Embedding tables look up rows instead of multiplying.
_TABLE = re.compile(
    r"embed|(^|_)emb(s|d|_|$)|^w[tp]e$|^token_types$|^shared$|^relative_attention_bias$|codebook",
    re.IGNORECASE,
)
_NORM = re.compile(r"norm(?!al)|^ln(_|\d|$)", re.IGNORECASE)
#: Suffixes that pruning and normalization in torch append to tensor names.
SUFFIXES = ("_orig", "_mask", "_g", "_v", "_u")
_PART = re.compile(rf"(^|\.)(weight({'|'.join(SUFFIXES)})|parametrizations\.weight\..+)$")

NOT_FINITE = "weight with values that are not finite"
IN_NO_LAYER = "not in a linear layer or convolution"


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


class Weight(NamedTuple):
    """Known properties of the weight of a linear layer or convolution.

    Attributes
    ----------
    dtype : str
        Its name in array libraries.
    shape : tuple of int
        Shape of the weight.
    axes : sequence of int
        Allowed numbers of axes.
    bias : tuple of int or None
        Shape of the bias, if there is one.
    others : sequence of str
        Names of other tensors and modules of the layer.
    shared : mapping of str to str
        Tensors of the layer that are shared with another layer, with their names there.
    odd : str or None
        A reason to keep the layer that only a network in memory can tell, or None.
    """

    dtype: str
    shape: tuple[int, ...]
    axes: Sequence[int] = AXES
    bias: tuple[int, ...] | None = None
    others: Sequence[str] = ()
    shared: Mapping[str, str] = {}
    odd: str | None = None


def reason_to_keep(weight: Weight) -> str | None:
    """Return why a weight is not factorized, or None if it is."""
    axes = weight.axes
    if weight.odd is not None:
        return weight.odd
    if weight.dtype not in _FLOATS:
        return f"weight of dtype {weight.dtype}"
    if len(weight.shape) not in axes:
        allowed = str(axes[0]) if len(axes) == 1 else f"{axes[0]} to {axes[-1]}"
        return f"weight with {len(weight.shape)} axes instead of {allowed}"
    if not math.prod(weight.shape):
        return "weight without entries"
    if weight.others:
        return f"layer with more than a weight and a bias: {min(weight.others)}"
    outputs = {weight.shape[0]}
    if len(weight.shape) == 2:  # some linear layers have a transposed weight
        outputs.add(weight.shape[1])
    if weight.bias is not None and weight.bias not in {(n,) for n in outputs}:
        return f"bias of shape {weight.bias}"
    for own, other in weight.shared.items():
        return f"{own} shared with {other}"
    return None


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

    @property
    def entries(self) -> int:
        """Entries of the weight."""
        return self.rows * self.columns * self.groups

    @property
    def error(self) -> float | None:
        """The error that says most of what was done to the network.

        That of the outputs on inputs that were held out, else on those of the fit, else that of the
        weight.
        """
        known = (self.layer_error, self.fitted_layer_error, self.relative_error)
        return next((error for error in known if error is not None), None)

    @property
    def outcome(self) -> str:
        """The method, or the status with the reason."""
        return self.method or ": ".join(filter(None, (self.status, self.message)))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a weight as a matrix: (out, in·kh·kw) for a convolution."""
    return (shape[0], math.prod(shape[1:]))


def kept_tensors(
    specs: Mapping[str, TensorSpec], shared: Mapping[str, str] | None = None
) -> dict[str, Kept]:
    """Return the tensors of a network that are not factorized, and why.

    Weights of linear layers and of 1-D to 3-D convolutions are factorized, as in
    `matfact.torch.compress`: tensors named ``weight``, floating-point or complex, with two to
    five axes, in a layer with no other tensor except a bias.

    Parameters
    ----------
    specs : mapping of str to TensorSpec
        All tensors by name; the other tensors of a layer help to recognize its weight.
    shared : mapping of str to str, optional
        Tensors shared by several layers, each with another of its names.
    """
    ordered = sorted(specs)
    reasons = {name: _reason(name, specs, ordered, shared or {}) for name in specs}
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
    return (
        array_dtype(spec.dtype) in _FLOATS and len(spec.shape) in AXES and math.prod(spec.shape) > 0
    )


def is_weight_name(name: str) -> bool:
    """Whether `name` is the name of a layer's weight."""
    return name.rpartition(".")[2] == "weight"


def layer_of(name: str) -> str:
    """Return the layer with weight `name`, "" for the network itself."""
    return name.removesuffix("weight").removesuffix(".")


def _reason(
    name: str, specs: Mapping[str, TensorSpec], ordered: Sequence[str], shared: Mapping[str, str]
) -> Kept | None:
    """Return why a tensor is kept, or None if it is a weight."""
    spec = specs[name]
    if _PART.search(name):
        return Kept("used to compute the weight of a layer")
    if not is_weight_name(name) or len(spec.shape) < 2:
        return Kept(IN_NO_LAYER)
    prefix = name.removesuffix("weight")
    bias = specs.get(f"{prefix}bias")
    weight = Weight(
        array_dtype(spec.dtype),
        spec.shape,
        bias=None if bias is None else bias.shape,
        others=others_in_layer(_held(prefix, ordered)),
        shared={own: shared[prefix + own] for own in ("weight", "bias") if prefix + own in shared},
    )
    if (reason := reason_to_keep(weight)) is not None:
        return Kept(reason)
    return None if bias is not None else _guess(name, spec)


def _guess(name: str, spec: TensorSpec) -> Kept | None:
    """Return what the name of a layer without bias suggests."""
    layer = next((part for part in reversed(name.split(".")[:-1]) if not part.isdigit()), "")
    if len(spec.shape) == 2 and _TABLE.search(layer):
        return Kept(f"{IN_NO_LAYER}: embeddings, by its name", is_guess=True)
    if _NORM.search(layer):
        return Kept(f"{IN_NO_LAYER}: normalization, by its name", is_guess=True)
    return None


def others_in_layer(held: Iterable[str]) -> list[str]:
    """Return the names that a layer holds, without those of its weight and bias.

    Examples are scales and zero points of quantized layers, gains, masks and adapters.
    """
    names = set(held)
    own = {base if base in names else f"{base}{suffix}"
           for base in ("weight", "bias") for suffix in SUFFIXES}  # fmt: skip
    return sorted(names - own)


def _held(prefix: str, ordered: Sequence[str]) -> Iterator[str]:
    """Yield ``weight`` and the first names in the layer whose tensors start with `prefix`."""
    yield "weight"
    if not prefix:  # the layer is the network itself, or names are not paths
        yield from (name for name in ordered if "." not in name)
        return
    start = bisect.bisect_left(ordered, prefix)
    for name in ordered[start : start + 4 + len(SUFFIXES)]:
        own, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix):
            yield f"{own}.{rest}" if rest and own in ("weight", "bias") else own
