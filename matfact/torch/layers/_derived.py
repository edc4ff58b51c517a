"""Cache of values derived from parameters, valid until the parameters change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

T = TypeVar("T")


def is_plain(x: Tensor) -> bool:
    """Whether only the value of `x` matters: no gradient, tracing or transformation."""
    return is_untransformed(x) and not (x.requires_grad and torch.is_grad_enabled())


def is_untransformed(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor outside of transformed code, and no mode looks on."""
    return (
        not torch.compiler.is_compiling()  # first, since what follows cannot be traced
        and type(x) in (Tensor, nn.Parameter)
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def are_plain(parameters: Sequence[Tensor]) -> bool:
    """Whether only the values of `parameters` matter: no gradient, tracing or substitute."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    if {*map(type, parameters)} != {nn.Parameter}:
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


class Derived(Generic[T]):
    """Cached result of a computation on the state of a module, updated when the state changes.

    Changes are detected by comparing with a copy, since writes through ``.data``, NumPy or DLPack
    change neither the address nor the version of a tensor. Copies and pickles of this object start
    empty.
    """

    def __init__(self) -> None:
        self.is_checked = True  #: whether to compare bits, or only torch's version counters
        self.clear()

    def clear(self) -> None:
        """Drop the cached result."""
        # One assignment, which other threads see as a whole.
        self._kept: tuple[list[Copy], T] | None = None

    def get(
        self,
        parameters: Sequence[Tensor],
        compute: Callable[[list[Copy]], T],
        positions: Sequence[Tensor] = (),
    ) -> T | None:
        """Return ``compute`` of copies of `parameters`, or None if it cannot be cached.

        It cannot if gradients are needed, in traced or transformed code, or if the parameters have
        been replaced by other tensors. The result may also depend on `positions`.
        """
        if not are_plain(parameters) or not _are_readable(parameters):
            return None
        state = [*parameters, *positions]
        if self._kept is not None:
            copies, value = self._kept
            same = (c.equals(t, self.is_checked) for c, t in zip(copies, state, strict=False))
            if len(copies) == len(state) and all(same):
                return value
        with torch.inference_mode(False), torch.no_grad():
            copies = [Copy(tensor) for tensor in state]
            value = compute(copies[: len(parameters)])
        self._kept = copies, value
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class Copy:
    """Snapshot of the bits of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._kind = tensor.dtype, tensor.shape, tensor.device
        self._place = _place(tensor)
        self._storage = tensor.detach()  # keeps the memory from being reused
        bits = _bits(tensor)
        # Python compares bytes with an array at memory speed.
        self._bits: Any = bits.clone() if isinstance(bits, Tensor) else bytearray(bits.tobytes())

    def equals(self, tensor: Tensor, is_checked: bool) -> bool:
        """Whether `tensor` has these bits or, unchecked, torch counted no write to it."""
        if (tensor.dtype, tensor.shape, tensor.device) != self._kind:
            return False
        if not is_checked and self._place is not None and _place(tensor) == self._place:
            return True
        bits = _bits(tensor)
        if isinstance(self._bits, Tensor):
            return torch.equal(self._bits, bits)
        return bool(self._bits == bits)

    def array(self) -> np.ndarray:
        """Return a copy of a host tensor as a NumPy array."""
        dtype, shape, _ = self._kind
        return np.frombuffer(self._bits, str(dtype).removeprefix("torch.")).reshape(shape)


def _place(tensor: Tensor) -> tuple[int, int] | None:
    """Return the address and version of a tensor, or None if torch does not track versions."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def _are_readable(tensors: Sequence[Tensor]) -> bool:
    """Whether values can be read: not on the meta device, nor during CUDA graph capture."""
    if any(tensor.is_meta for tensor in tensors):
        return False
    return not (any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing())


def _bits(tensor: Tensor) -> Any:
    """Return a view of a tensor as integers or bytes, so that NaN equals itself.

    The view is a NumPy array for host tensors, else a tensor.
    """
    if tensor.is_cpu and not (tensor.itemsize < 4 and tensor.is_floating_point()):
        return np.ascontiguousarray(tensor.numpy(force=True))
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    tensor = tensor.view({1: torch.uint8, 2: torch.int16}.get(tensor.itemsize, torch.int32))
    return tensor.numpy() if tensor.is_cpu else tensor


def keep_unchecked(model: nn.Module) -> nn.Module:
    """Skip the check for writes to values that bypass autograd.

    In eval mode, layers cache what they derive from their values, and compare the values with a
    copy in every pass. This costs little for many samples, but up to two thirds of the time for a
    few, and synchronizes with a GPU. Sparse factors on the CPU are applied as they are stored,
    without any check, if they are faster than the dense matrix; unchecked layers do so with single
    samples only, and keep a rearranged copy for several. So are dense factors of few bits, with any
    number of samples. Without the check, layers still notice changes that torch tracks: optimizers,
    loading, moves and in-place operations. They do not notice writes through ``.data``,
    ``.detach().numpy()`` or DLPack.

    Parameters
    ----------
    model : torch.nn.Module
        A factorized layer, or a network that contains some. Copies of it compare again.

    Returns
    -------
    torch.nn.Module
        `model`, changed in place.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch import SparseProductLinear, keep_unchecked
    >>> layer = keep_unchecked(SparseProductLinear(64, 32, random_state=0).eval())
    >>> with torch.no_grad():
    ...     before = layer(torch.ones(64))
    ...     _ = layer.factors[0].values.mul_(2)  # noticed
    ...     torch.allclose(layer(torch.ones(64)), 2 * before)
    True
    """
    for derived in _derived(model):
        derived.is_checked = False
    return model


def forget(module: nn.Module) -> None:
    """Drop all caches in `module`, which may be as large as its values."""
    for derived in _derived(module):
        derived.clear()


def _derived(module: nn.Module) -> list[Derived[Any]]:
    held = (value for each in module.modules() for value in vars(each).values())
    return [value for value in held if isinstance(value, Derived)]
