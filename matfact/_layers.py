"""Which weights of a network are factorized, why others are not, and the record of each layer.

One rule, :func:`reason_to_keep`, decides from what is known of a weight. A network in memory knows
more (:mod:`matfact.torch.layers._matricized`) than a file, which has names, shapes and dtypes.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from matfact._safetensors import TensorSpec, array_dtype

#: Dtypes whose numbers are the values themselves.
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
#: Axes of the weights of linear layers, and of convolutions in one to three dimensions.
AXES = range(2, 6)

#: Tables look up rows instead of multiplying.
_TABLE = re.compile(
    r"embed|(^|_)emb(s|_|$)|^w[tp]e$|^shared$|^relative_attention_bias$|codebook", re.IGNORECASE
)
_NORM = re.compile(r"norm(?!al)|^ln(_|\d|$)", re.IGNORECASE)
#: What pruning and normalization in torch append to the names of the tensors they keep.
SUFFIXES = ("_orig", "_mask", "_g", "_v", "_u")
_PART = re.compile(rf"(^|\.)(weight({'|'.join(SUFFIXES)})|parametrizations\.weight\..+)$")

NOT_FINITE = "weight with values that are not finite"
IN_NO_LAYER = "in no linear layer or convolution"


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


class Weight(NamedTuple):
    """What is known of the weight of a linear layer or a convolution.

    Attributes
    ----------
    dtype : str
        By its name in array libraries.
    shape : tuple of int
        Of the weight.
    axes : sequence of int
        Numbers of axes that the layer may have.
    bias : tuple of int or None
        Shape of the bias, if there is one.
    others : sequence of str
        What the layer holds besides.
    shared : mapping of str to str
        Which of the layer's tensors another layer holds too, and their names there.
    odd : str or None
        What only a network knows: a reason to keep the layer, if there is one.
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
        return f"layer that holds more than weight and bias: {min(weight.others)}"
    outputs = {weight.shape[0]}
    if len(weight.shape) == 2:  # some linear layers keep their weight transposed
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

    @property
    def outcome(self) -> str:
        """The method, or that the layer is kept and why."""
        return self.method or ": ".join(filter(None, (self.status, self.message)))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a weight as a matrix: (out, in·kh·kw) for a convolution."""
    return (shape[0], math.prod(shape[1:]))


def kept_tensors(
    specs: Mapping[str, TensorSpec], shared: Mapping[str, str] | None = None
) -> dict[str, Kept]:
    """Return the tensors of a network that are no weights to be factorized, and why.

    Weights are those of linear layers and of convolutions in one to three dimensions, as
    :func:`matfact.torch.compress` takes them: named ``weight``, floating-point or complex, of two
    to five axes, in a layer that holds nothing but them and a bias.

    Parameters
    ----------
    specs : mapping of str to TensorSpec
        All tensors by name: the others in a layer tell what its weight is.
    shared : mapping of str to str, optional
        Tensors that several layers use, with another name of each.
    """
    ordered = sorted(specs)
    reasons = {name: _reason(name, specs, ordered, shared or {}) for name in specs}
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
    return (
        array_dtype(spec.dtype) in _FLOATS and len(spec.shape) in AXES and math.prod(spec.shape) > 0
    )


def is_weight_name(name: str) -> bool:
    """Whether `name` is that of the weight of a layer."""
    return name.rpartition(".")[2] == "weight"


def layer_of(name: str) -> str:
    """Return the layer whose weight is `name`, "" for the network itself."""
    return name.removesuffix("weight").removesuffix(".")


def _reason(
    name: str, specs: Mapping[str, TensorSpec], ordered: Sequence[str], shared: Mapping[str, str]
) -> Kept | None:
    """Return why one tensor is kept, None where it is a weight."""
    spec = specs[name]
    if _PART.search(name):
        return Kept("part of what a layer computes its weight from")
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
    """Return what the name of a layer without bias tells."""
    layer = next((part for part in reversed(name.split(".")[:-1]) if not part.isdigit()), "")
    if len(spec.shape) == 2 and _TABLE.search(layer):
        return Kept(f"{IN_NO_LAYER}: embeddings, by the name", is_guess=True)
    if _NORM.search(layer):
        return Kept(f"{IN_NO_LAYER}: normalization, by the name", is_guess=True)
    return None


def others_in_layer(held: Iterable[str]) -> list[str]:
    """Return what a layer holds besides what its weight and its bias are stored in.

    Scales and zero points of quantized layers, gains, masks and adapters are such.
    """
    names = set(held)
    own = {base if base in names else f"{base}{suffix}"
           for base in ("weight", "bias") for suffix in SUFFIXES}  # fmt: skip
    return sorted(names - own)


def _held(prefix: str, ordered: Sequence[str]) -> Iterator[str]:
    """Yield the first names in the layer whose tensors start with `prefix`, and its weight."""
    yield "weight"
    if not prefix:  # the layer is the network itself, or the names are no paths
        yield from (name for name in ordered if "." not in name)
        return
    start = bisect.bisect_left(ordered, prefix)
    for name in ordered[start : start + 4 + len(SUFFIXES)]:
        own, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix):
            yield f"{own}.{rest}" if rest and own in ("weight", "bias") else own
