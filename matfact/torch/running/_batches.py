"""Calling a model on batches of any kind."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.running._offloaded import is_offloaded, used_on

#: Additive attention masks hide a token below this value.
_HIDDEN = -1e3
#: The stance of torch.compile: its users, and a lock for changes.
_STANCE, _WRITTEN, _CHANGING = contextlib.ExitStack(), list[None](), threading.Lock()


def forward(model: nn.Module, batch: Any) -> Any:
    """Call `model` on a batch, on the device of the model.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    batch : tensor, mapping, tuple or list
        A mapping holds keyword arguments. Of a tuple or list, the model gets the first entries: as
        many as its ``forward`` requires, at least one, so that labels after them are ignored; all
        if it takes any number. The model gets a copy, since it may modify its inputs and other
        passes need the original batch.
    """
    memo: dict[int, Any] = {}
    batch = moved(batch, device_of(model), lambda value: duplicate(value, memo))
    if hasattr(batch, "keys"):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch[: _n_taken(model)])
    return model(batch)


def attended(x: Tensor, batch: Any, model: nn.Module) -> Tensor:
    """Return the input tokens of a layer without padding.

    Parameters
    ----------
    x : Tensor
        The input of a layer that multiplies rows.
    batch : tensor, mapping, tuple or list
        Input of the network. Padding is where the ``attention_mask`` of a mapping, of shape
        (samples, tokens), is zero. In an encoder-decoder network with equally many tokens on both
        sides, a token counts if either side's mask includes it.
    model : torch.nn.Module
        The network.
    """
    if x.is_nested:  # without padding
        return torch.cat([sample.reshape(-1, sample.shape[-1]) for sample in x.unbind()])
    for (n_samples, n_tokens), mask in _masks(batch, model).items():
        mask = mask.to(x.device)
        if x.ndim > 2 and x.shape[:2] == (n_samples, n_tokens):
            return x[mask]
        if x.ndim == 2 and x.shape[0] == n_samples * n_tokens:
            return x[mask.reshape(-1)]
        if x.ndim == 3 and x.shape[:2] == (n_tokens, n_samples):
            return x[mask.T]
        if x.ndim == 4 and (x.shape[0], x.shape[2]) == (n_samples, n_tokens):  # head by head
            return x.transpose(1, 2)[mask]
    return x


def _masks(batch: Any, model: nn.Module) -> dict[tuple[int, int], Tensor]:
    """Return the masks of tokens that count, for each shape (samples, tokens) with padding."""
    if not hasattr(batch, "keys"):
        return {}
    entries = {k: batch[k] for k in batch.keys() if isinstance(batch[k], Tensor)}  # noqa: SIM118
    found: dict[tuple[int, int], Tensor] = {}
    for side in ("", "decoder_"):
        kept = _attended_tokens(entries.get(f"{side}attention_mask"))
        if kept is None:
            continue
        shape = (kept.shape[0], kept.shape[1])
        found[shape] = found[shape].to(kept.device) | kept if shape in found else kept
    if "decoder_attention_mask" not in entries:  # all decoder tokens count
        config = getattr(model, "config", None)
        names = ["labels"] if getattr(config, "is_encoder_decoder", False) else []
        for name in [*names, *(name for name in entries if name.startswith("decoder_"))]:
            if name in entries:
                found.pop(tuple(entries[name].shape[:2]), None)
    return found


def _attended_tokens(mask: Tensor | None) -> Tensor | None:
    """Return a mask (samples, tokens) of the tokens that count, or None if it is unclear.

    The given mask may have axes for heads and queries, and may be additive.
    """
    if mask is None or mask.ndim < 2 or any(n != 1 for n in mask.shape[1:-1]):
        return None
    mask = mask.reshape(mask.shape[0], mask.shape[-1])
    if bool(((mask == 0) | (mask == 1)).all()):
        return mask.bool() if bool(mask.any()) else None  # an additive mask may be all zeros
    if mask.is_floating_point() and bool(((mask == 0) | (mask < _HIDDEN)).all()):
        return mask == 0
    return None


def _n_taken(model: nn.Module) -> int | None:
    """Return the number of required positional arguments of ``model.forward``, None for any."""
    wrapped = getattr(model, "module", getattr(model, "_orig_mod", None))
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        # Wrappers, such as DataParallel, take the arguments of the wrapped network.
        return _n_taken(wrapped) if isinstance(wrapped, nn.Module) else None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is p.empty for p in parameters))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network itself, without wrappers for several devices or compiled code."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    wrapped = getattr(model, "_orig_mod", None)
    return unwrapped(wrapped) if isinstance(wrapped, nn.Module) else model


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of `model`, where it is used."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            return used_on(module) if is_offloaded(module) else parameter.device
    return torch.device("cpu")


def moved(
    value: Any, device: torch.device, copied: Callable[[Any], Any] = lambda value: value
) -> Any:
    """Return `value`, a tensor or a container, with its tensors on `device`, copied if needed."""
    if isinstance(value, Tensor):
        there = value.to(device)
        return copied(value) if there is value else there
    if hasattr(value, "keys"):
        return {key: moved(value[key], device, copied) for key in value.keys()}  # noqa: SIM118
    if isinstance(value, (list, tuple)):
        return [moved(item, device, copied) for item in value]
    return copied(value)


def duplicate(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of `value`, or itself if it cannot be copied (generators)."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value.clone() if isinstance(value, Tensor) else value


def check_collection(batches: Any) -> None:
    """Raise ``ValueError`` if `batches` is a single batch."""
    if isinstance(batches, (Tensor, str)) or hasattr(batches, "keys"):
        raise ValueError(
            f"the batches must be a collection of batches, got a single {type(batches).__name__}: "
            "put it into a list."
        )


def checked(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield `batches`; raise if there are none."""
    check_collection(batches)
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError(
            "the batches must hold at least one, got none (an iterator can be used up only once)."
        )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, uncompiled, and restore the mode of each module afterwards."""
    # Weak references, so that replaced modules need not stay in memory.
    modes = [(weakref.ref(module), module.training) for module in model.modules()]
    model.eval()
    try:
        with as_written():
            yield
    finally:
        for reference, training in modes:
            module = reference()
            if module is not None:
                module.training = training


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Run compiled networks uncompiled, since compiled code ignores new hooks.

    The stance of torch.compile is global: the first thread changes it and the last restores it.
    """
    with _CHANGING:
        if not _WRITTEN:
            _STANCE.enter_context(torch.compiler.set_stance("force_eager"))
        _WRITTEN.append(None)
    try:
        yield
    finally:
        with _CHANGING:
            _WRITTEN.pop()
            if not _WRITTEN:
                _STANCE.close()
