"""What is derived from parameters, kept while those stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

T = TypeVar("T")


def is_plain(x: Tensor) -> bool:
    """Whether nothing but the value of `x` counts: no gradient, tracing or transformation."""
    return is_untransformed(x) and not (x.requires_grad and torch.is_grad_enabled())


def is_untransformed(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor outside of code that is transformed."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def are_plain(parameters: Sequence[Tensor]) -> bool:
    """Whether nothing but the values of `parameters` counts: no gradient, tracing or substitute."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or {*map(type, parameters)} != {nn.Parameter}:
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


class Derived(Generic[T]):
    """Something computed from the state of a module, anew after each change of it.

    Copies of the state tell of changes. Nothing less would do: what is written through ``.data``,
    through NumPy or through DLPack changes neither the place nor the version of a tensor. Copies
    and pickles of this start empty.
    """

    def __init__(self) -> None:
        self.is_checked = True  #: whether the bits are compared, or what torch counts alone
        self.clear()

    def clear(self) -> None:
        """Keep nothing until it is wanted again."""
        # In one piece, which other threads see whole.
        self._kept: tuple[list[Copy], T] | None = None

    def get(
        self,
        parameters: Sequence[Tensor],
        compute: Callable[[list[Copy]], T],
        positions: Sequence[Tensor] = (),
    ) -> T | None:
        """Return what `compute` makes of copies of `parameters`, or None where it cannot be kept.

        That is where gradients are wanted, in traced and transformed code, and in code that has
        replaced the parameters by tensors of its own. `positions` are what else it depends on.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[T]], tuple[()]]:
        return Derived, ()


class Copy:
    """The bits of a tensor as they were."""

    def __init__(self, tensor: Tensor) -> None:
        self._kind = tensor.dtype, tensor.shape, tensor.device
        self._place = _place(tensor)
        self._storage = tensor.detach()  # held, so that no other comes to stand at the same place
        bits = _bits(tensor)
        # Python compares such bytes with those of an array as fast as they come from memory.
        self._bits: Any = bits.clone() if isinstance(bits, Tensor) else bytearray(bits.tobytes())

    def equals(self, tensor: Tensor, is_checked: bool) -> bool:
        """Whether `tensor` has these bits, or else torch knows of no write to it."""
        if (tensor.dtype, tensor.shape, tensor.device) != self._kind:
            return False
        if not is_checked and self._place is not None and _place(tensor) == self._place:
            return True
        bits = _bits(tensor)
        if isinstance(self._bits, Tensor):
            return torch.equal(self._bits, bits)
        return bool(self._bits == bits)

    def array(self, dtype: Any) -> np.ndarray:
        """Return a tensor of the host as an array of a NumPy dtype, in memory of its own."""
        return np.frombuffer(self._bits, dtype).reshape(self._kind[1])


def _place(tensor: Tensor) -> tuple[int, int] | None:
    """Return where a tensor stands and how often it was written to, None where none counts."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)


def _are_readable(tensors: Sequence[Tensor]) -> bool:
    """Whether the host can look at values: not where there are none, nor while CUDA records."""
    if any(tensor.is_meta for tensor in tensors):
        return False
    return not (any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing())


def _bits(tensor: Tensor) -> Any:
    """Return whole numbers or bytes, NaN being equal to itself, in memory that is shared.

    They are a NumPy array on the host and a tensor elsewhere.
    """
    if tensor.is_cpu and not (tensor.itemsize < 4 and tensor.is_floating_point()):
        return np.ascontiguousarray(tensor.numpy(force=True))
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    tensor = tensor.view({1: torch.uint8, 2: torch.int16}.get(tensor.itemsize, torch.int32))
    return tensor.numpy() if tensor.is_cpu else tensor


def keep_unchecked(model: nn.Module) -> nn.Module:
    """Skip the check for writes to values that bypass autograd.

    In eval mode, layers keep what they have made of their values, and compare these at each pass
    with a copy. That takes little against a product with many samples, up to two thirds of the
    time of one with a single sample, and has to wait for a GPU. Without it, they still notice what
    torch counts: optimizers, loading, moves and operations in place. They do not notice what is
    written through ``.data``, through ``.detach().numpy()`` or through DLPack.

    Parameters
    ----------
    model : torch.nn.Module
        A factorized layer or a network of such, whose copies will compare again.

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
    """Let `module` and what is in it keep nothing derived, which takes as much memory as they."""
    for derived in _derived(module):
        derived.clear()


def _derived(module: nn.Module) -> list[Derived[Any]]:
    held = (value for each in module.modules() for value in vars(each).values())
    return [value for value in held if isinstance(value, Derived)]
