"""States of the random number generators used by forward passes, even in eval mode."""

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
#: Held by the thread that changes the generators.
_DRAWING = threading.RLock()


@dataclasses.dataclass(frozen=True)
class RandomState:
    """Snapshot of the global generators of torch, NumPy and `random`.

    Attributes
    ----------
    device : torch.device
        Device of a network; the generators of all accelerators of its kind are included.
    host : Tensor
        State of torch's generator on the CPU.
    accelerators : list of Tensor
        States of torch's generators on accelerators.
    numpy, python : tuple
        States of the generators of NumPy and `random`.
    own : list of tuple
        Generators held by modules of a network, with their states.
    """

    device: torch.device
    host: Tensor
    accelerators: list[Tensor]
    numpy: Any
    python: tuple[Any, ...]
    own: list[tuple[torch.Generator, Tensor]]

    @classmethod
    def now(cls, device: torch.device, generators: Iterable[torch.Generator] = ()) -> RandomState:
        """Return the current state of the generators, including the given ones."""
        accelerators = [torch_module.get_rng_state(*at) for torch_module, at in _elsewhere(device)]
        host = torch.get_rng_state()
        numpy = np.random.get_state()  # noqa: NPY002 (networks draw from it)
        own = [(generator, generator.get_state()) for generator in generators]
        return cls(device, host, accelerators, numpy, random.getstate(), own)

    @classmethod
    def seeded(
        cls, seed: int, device: torch.device, generators: Iterable[torch.Generator] = ()
    ) -> RandomState:
        """Return the state that seeding with `seed` would give, without seeding."""
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
        """Return the current state of the same generators."""
        return RandomState.now(self.device, [generator for generator, _ in self.own])

    def restore(self) -> None:
        """Set the generators to this state."""
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
    """Return the generators held by modules as attributes."""
    held = (v for model in models for module in model.modules() for v in vars(module).values())
    return list(dict.fromkeys(value for value in held if isinstance(value, torch.Generator)))


def batch_states(*models: nn.Module) -> Iterator[RandomState]:
    """Return an infinite sequence of states, one per batch.

    It is derived from the current state of torch's generator, which does not change.

    Parameters
    ----------
    *models : torch.nn.Module
        Networks that batches pass through.
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
    """Set the generators to `state`, and restore them afterwards.

    Generators are global, so other threads wait.
    """
    with _DRAWING:
        before = state.renewed()
        state.restore()
        try:
            yield
        finally:
            before.restore()


def _elsewhere(device: torch.device) -> list[tuple[Any, tuple[int, ...]]]:
    """Return torch's module for accelerators like `device`, with the index of each."""
    if device.type in _HOST:
        return []
    torch_module: Any = torch.get_device_module(device)
    if device.type == "mps":  # a single device; its functions take no index
        return [(torch_module, ())]
    return [(torch_module, (index,)) for index in range(torch_module.device_count())]
