"""Checks that a checkpoint fits a network, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matfact._safetensors import FLOAT8
from matfact._text import printable
from matfact.checkpoint import Checkpoint
from matfact.torch.checkpoint._masked import masked_parameters_of

#: Dtypes missing in NumPy, by their names in safetensors files.
_BEYOND_NUMPY = {stored: name for name, stored in FLOAT8.items()}


#: Dtypes of torch, by their names in safetensors files.
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64",
    "I64": "int64", "F64": "float64", "C64": "complex64", **_BEYOND_NUMPY,
}  # fmt: skip
#: Interchangeable dtypes: the network's dtype is used.
_CAST = (torch.float16, torch.bfloat16, torch.float32)


class State:
    """Tensors of a network, by their possible names in a checkpoint.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    network : Checkpoint
        The checkpoint to load.
    replaced : sequence of str
        Names of the layers that get factors.
    """

    def __init__(self, model: nn.Module, network: Checkpoint, replaced: Sequence[str]) -> None:
        self._network = network
        self._replaced = frozenset(replaced)
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        self._masked = [
            parameter
            for parameter in masked_parameters_of(model)
            if f"{parameter.label}_orig" not in network  # written by earlier versions
        ]
        self._own = dict(self._named(model.state_dict(keep_vars=True)))
        self._together: dict[Any, list[str]] = {}
        for name, tensor in self._own.items():
            self._together.setdefault(place(tensor), []).append(name)

    def _named(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors; masked ones by their name without the mask."""
        masked = {id(parameter.original) for parameter in self._masked}
        masks = {id(p.module.get_buffer(f"{p.name}_mask")) for p in self._masked}
        for name, tensor in state.items():
            if id(tensor) not in masks:
                is_masked = id(tensor) in masked and name.endswith("_orig")
                yield name.removesuffix("_orig") if is_masked else name, tensor

    def checked(self, names: Sequence[str], strict: bool) -> list[str]:
        """Return the `names` in the checkpoint to load as tensors.

        Raises
        ------
        ValueError
            If these and the replaced layers do not cover the network, or do not fit it.
        """
        held = [name for name in names if name in self._own]
        if strict:
            raise_if("lacks", self._missing(set(held)))
            other = [name for name in names if name not in self._own]
            raise_if("also has", [name for name in other if not self._is_derived(name)])
        for name in held:
            there, here = self._network.tensors[name].spec.shape, tuple(self._own[name].shape)
            if there != here:
                raise misfit(name, there, here)
            check_dtype(self._network, name, self._own[name].dtype)
        return held

    def _missing(self, held: set[str]) -> list[str]:
        """Return the tensors that are neither in the checkpoint nor tied to one in it."""
        return [
            name
            for names in self._together.values()
            if not any(name in held or self._is_replaced(name) for name in names)
            for name in names
        ]

    def _is_replaced(self, name: str) -> bool:
        """Whether a tensor is in a replaced layer, which inherits the bias."""
        *parts, leaf = name.split(".")
        layers = (".".join(parts[:n]) for n in range(len(parts) + 1))
        return leaf != "bias" and any(layer in self._replaced for layer in layers)

    def _is_derived(self, name: str) -> bool:
        """Whether the network already has the same tensor, as newer versions of it may."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.is_meta or self._network.tensors[name].is_product:
            return False
        tensor = stored_tensor(self._network, name)
        return tensor.shape == buffer.shape and torch.equal(buffer.cpu().to(tensor.dtype), tensor)

    def check_shared(
        self, tensors: Mapping[str, Tensor], replaced: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        """Raise ``ValueError`` if a shared tensor has two values in the checkpoint."""
        for names in self._together.values():
            first, *others = [name for name in names if name in tensors] or [""]
            for name in others:
                if not torch.equal(tensors[first], tensors[name]):
                    raise _differing(first, name)
        for name in tensors.keys() & replaced.keys():
            if not torch.equal(tensors[name], replaced[name]()):
                raise _differing(name, "a layer that shares it")

    def tied(
        self, tensors: Mapping[str, Tensor], replaced: Mapping[str, Callable[[], Tensor]]
    ) -> dict[str, Tensor]:
        """Return tensors outside of layers that are tied to the weight of a replaced layer."""
        found: dict[str, Tensor] = {}
        for names in self._together.values():
            weight = next((name for name in names if name in replaced), None)
            others = [name for name in names if not self._is_replaced(name)]
            if weight is not None and others and not any(name in tensors for name in names):
                found |= dict.fromkeys(others, replaced[weight]())
        return found

    def unmask(self, tensors: Mapping[str, Tensor]) -> None:
        """Remove the masks of parameters that get all of their values."""
        for parameter in self._masked:
            names = self._together[place(parameter.original)]
            is_loaded = any(name in tensors for name in names)
            if is_loaded and not self._is_replaced(parameter.label):
                parameter.unmask()


def check_dtype(network: Checkpoint, name: str, here: torch.dtype) -> None:
    """Raise ``ValueError`` if the network's dtype cannot represent a tensor."""
    there: torch.dtype = getattr(torch, _DTYPES[network.tensors[name].spec.dtype])
    if here == there or (here in _CAST and there in _CAST):
        return
    numbers = [t.is_floating_point or t.is_complex for t in (there, here)]
    if numbers[0] == numbers[1] and _widens(there, here):
        return
    raise ValueError(
        f"path must name a checkpoint of this network, but {name!r} is {there} there and "
        f"{here} here, which cannot represent all of its numbers."
    )


def _widens(there: torch.dtype, here: torch.dtype) -> bool:
    try:
        return torch.promote_types(there, here) == here
    except (RuntimeError, TypeError):  # dtypes without arithmetic
        return False


def place(tensor: Tensor) -> Any:
    """Return a key shared only by tensors with the same memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def stored_tensor(network: Checkpoint, name: str) -> Tensor:
    """Return a tensor of a checkpoint; factors outside of layers are multiplied."""
    spec = network.tensors[name].spec
    if network.tensors[name].is_product:
        return torch.from_numpy(network.product(name).toarray()).reshape(spec.shape)
    file = network.file(name)
    if spec.dtype in _BEYOND_NUMPY:
        content = torch.frombuffer(bytearray(b"".join(file.chunks(name))), dtype=torch.uint8)
        return content.view(getattr(torch, _BEYOND_NUMPY[spec.dtype])).reshape(spec.shape)
    return torch.from_numpy(file.read(name))


def raise_if(what: str, names: Sequence[str]) -> None:
    """Raise ``ValueError`` if there are any `names`."""
    if names:
        shown = ", ".join(map(printable, names[:5])) + (", …" if len(names) > 5 else "")
        raise ValueError(f"path must name a checkpoint of this network, but it {what} {shown}.")


def misfit(name: str, there: Sequence[int], here: Sequence[int]) -> ValueError:
    """Return the error for a tensor of another shape than that of the network."""
    return ValueError(
        f"path must name a checkpoint of this network, but {name!r} has shape "
        f"{tuple(there)} there and {tuple(here)} here."
    )


def _differing(name: str, other: str) -> ValueError:
    return ValueError(
        "path must name a checkpoint of this network, in which one tensor is shared, but "
        f"{name!r} and {other!r} differ there."
    )
