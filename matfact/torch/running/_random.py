"""States of the random number generators that forward passes may draw from, in eval mode too."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from matfact.torch.running._batches import device_of

#: Devices without generators of their own.
_HOST = ("cpu", "meta")
#: Held by the thread that has changed the generators.
_DRAWING = threading.RLock()


@dataclasses.dataclass(frozen=True)
class RandomState:
    """A snapshot of the global generators: those of torch, of NumPy and of :mod:`random`.

    Attributes
    ----------
    device : torch.device
        The device of a network; the generators of all accelerators of its kind are included.
    host : Tensor
        State of torch's generator on the CPU.
    accelerators : list of Tensor
        States of its generators elsewhere.
    numpy, python : tuple
        States of the others.
    own : list of tuple
        Generators that modules of a network hold, with their states.
    """

    device: torch.device
    host: Tensor
    accelerators: list[Tensor]
    numpy: Any
    python: tuple[Any, ...]
    own: list[tuple[torch.Generator, Tensor]]

    @classmethod
    def now(cls, device: torch.device, generators: Iterable[torch.Generator] = ()) -> RandomState:
        """Return the state in which the generators are, those given included."""
        accelerators = [torch_module.get_rng_state(*at) for torch_module, at in _elsewhere(device)]
        host = torch.get_rng_state()
        numpy = np.random.get_state()  # noqa: NPY002 (networks draw from it)
        own = [(generator, generator.get_state()) for generator in generators]
        return cls(device, host, accelerators, numpy, random.getstate(), own)

    @classmethod
    def seeded(
        cls, seed: int, device: torch.device, generators: Iterable[torch.Generator] = ()
    ) -> RandomState:
        """Return the state after all generators have been given `seed`, which they are not."""
        accelerators = [
            torch.Generator(torch.device(device.type, *at)).manual_seed(seed).get_state()
            for _, at in _elsewhere(device)
        ]
        host = torch.Generator().manual_seed(seed).get_state()
        numpy = np.random.RandomState(seed % 2**32).get_state()
        own = [
            (each, torch.Generator(each.device).manual_seed(seed).get_state())
            for each in generators
        ]
        return cls(device, host, accelerators, numpy, random.Random(seed).getstate(), own)

    def renewed(self) -> RandomState:
        """Return the state in which the same generators are now."""
        return RandomState.now(self.device, [generator for generator, _ in self.own])

    def restore(self) -> None:
        """Put the generators into this state."""
        torch.set_rng_state(self.host)
        for (torch_module, at), state in zip(
            _elsewhere(self.device), self.accelerators, strict=True
        ):
            torch_module.set_rng_state(state, *at)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
        for generator, state in self.own:
            generator.set_state(state)


def generators_of(*models: nn.Module) -> list[torch.Generator]:
    """Return the generators that modules hold as attributes."""
    held = (v for model in models for module in model.modules() for v in vars(module).values())
    return list(dict.fromkeys(value for value in held if isinstance(value, torch.Generator)))


def batch_states(*models: nn.Module) -> Iterator[RandomState]:
    """Return an endless sequence of states, one for each batch.

    It follows from the state of torch's generator at the time of the call, which stays as it is.

    Parameters
    ----------
    *models : torch.nn.Module
        The networks that passes of a batch go through.
    """
    seeds = torch.Generator()
    with _DRAWING:
        seeds.set_state(torch.get_rng_state())
    return _states(seeds, device_of(models[0]), generators_of(*models))


def _states(
    seeds: torch.Generator, device: torch.device, own: list[torch.Generator]
) -> Iterator[RandomState]:
    while True:
        seed = int(torch.randint(2**62, (), generator=seeds))
        yield RandomState.seeded(seed, device, own)


@contextlib.contextmanager
def drawing(state: RandomState) -> Iterator[None]:
    """Let the generators start from `state`, and put them back to where they were after.

    They are the process's, so that other threads that want them wait.
    """
    with _DRAWING:
        before = state.renewed()
        state.restore()
        try:
            yield
        finally:
            before.restore()


def _elsewhere(device: torch.device) -> list[tuple[Any, tuple[int, ...]]]:
    """Return torch's module for accelerators like `device`, once for each with its index."""
    if device.type in _HOST:
        return []
    torch_module: Any = torch.get_device_module(device)
    if device.type == "mps":  # there is one, and its functions take no index
        return [(torch_module, ())]
    return [(torch_module, (index,)) for index in range(torch_module.device_count())]
