"""Errors of compressed networks and their layers on inputs not used for calibration."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks.subjects import Seen, Subject


class Loss:
    """Relative error of rows of outputs, accumulated over batches.

    Parameters
    ----------
    centered : bool
        Whether to centre the reference outputs. The error itself is never centred.
    """

    def __init__(self, centered: bool) -> None:
        self._centered = centered
        self._count = 0
        self._lost = self._energy = 0.0
        self._sum: Any = 0.0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Count rows, of any leading axes."""
        wanted = wanted.flatten(0, -2).double()
        self._count += len(wanted)
        self._lost += float((found.flatten(0, -2) - wanted).square().sum())
        self._energy += float(wanted.square().sum())
        self._sum = self._sum + wanted.sum(0)

    def relative(self) -> float:
        """Return the relative error, NaN without rows."""
        total = self._energy
        if self._centered and self._count:
            total -= float(self._sum.square().sum()) / self._count
        return math.sqrt(self._lost / total) if total > 0 else math.nan


class Measured(NamedTuple):
    """Measurements on fresh inputs.

    Attributes
    ----------
    outputs : dict of str to float
        Measures of the network's outputs.
    parts : list of dict
        The same per batch, to estimate the noise.
    layers : dict of str to float
        The error of each layer.
    """

    outputs: dict[str, float]
    parts: list[dict[str, float]]
    layers: dict[str, float]


def measure(subject: Subject, small: nn.Module, names: Sequence[str], paired: bool) -> Measured:
    """Measure a compressed network and its layers on fresh inputs.

    Parameters
    ----------
    subject : Subject
        The dense network and the inputs. Both networks draw the same random numbers.
    small : torch.nn.Module
        The compressed network.
    names : sequence of str
        Compressed layers.
    paired : bool
        Whether the reference output of a layer is that in the dense network; otherwise it is the
        output of the dense layer for its input in the compressed network.
    """
    dense = dict(subject.model.named_modules(remove_duplicate=False))
    losses = {name: Loss(getattr(dense[name], "bias", None) is not None) for name in names}
    outputs, parts = _Outputs(), []
    for seed, batch in enumerate(subject.fresh):
        wanted: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(name: str, x: Tensor, y: Tensor, wanted: Any = wanted) -> None:
            wanted[name].append(y)

        def compare(name: str, x: Tensor, y: Tensor, wanted: Any = wanted) -> None:
            target = wanted[name].pop(0) if paired else dense[name](x)
            losses[name].add(_rows(target, batch), _rows(y, batch))  # noqa: B023

        with _watched(subject.model, names if paired else (), keep):
            right = _seen(subject, subject.model, batch, seed)
        with _watched(small, names, compare):
            found = _seen(subject, small, batch, seed)
        part = _Outputs()
        for each in (outputs, part):
            each.add(right, found)
        parts.append(part.measures())
    errors = {name: loss.relative() for name, loss in losses.items()}
    return Measured(outputs.measures(), parts, errors)


@torch.no_grad()
def _seen(subject: Subject, network: nn.Module, batch: Any, seed: int) -> Seen:
    torch.manual_seed(seed)
    return subject.seen(network, batch)


@contextlib.contextmanager
def _watched(
    network: nn.Module, names: Sequence[str], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `see` with the name, input and output of each layer that is called."""
    with contextlib.ExitStack() as handles:
        for name in names:

            def hook(layer: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                see(name, args[0], output)

            handle = network.get_submodule(name).register_forward_hook(hook)
            handles.callback(handle.remove)
        yield


def _rows(output: Tensor, batch: Any) -> Tensor:
    """Return a layer's output with channels last and without padding."""
    if output.ndim == 4:  # of a 2-D convolution
        return output.movedim(1, -1)
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    return output if mask is None else output[mask.bool()]


class _Outputs:
    """Measures of a network's outputs over many batches."""

    def __init__(self) -> None:
        self._error = Loss(centered=True)
        self._totals: dict[str, float] = {}
        self._count = 0

    def add(self, dense: Seen, small: Seen) -> None:
        # A network in half precision is measured in single.
        logits = None if small.logits is None else small.logits.float()
        small = small._replace(state=small.state.float(), logits=logits)
        self._error.add(dense.state, small.state)
        self._count += len(dense.state)
        found = {"1 − cosine": 1 - functional.cosine_similarity(dense.state, small.state)}
        if dense.logits is not None and small.logits is not None:
            p, q = dense.logits.log_softmax(1), small.logits.log_softmax(1)
            losses = functional.kl_div(q, p, reduction="none", log_target=True)
            found = {"divergence": losses.sum(1)}
            if small.targets is not None:
                found |= _predictions("", q, small.targets)
                found |= _predictions("dense ", p, small.targets)
        for name, values in found.items():
            self._totals[name] = self._totals.get(name, 0.0) + float(values.sum(dtype=torch.double))

    def measures(self) -> dict[str, float]:
        means = {name: total / self._count for name, total in self._totals.items()}
        return {"output error": self._error.relative(), **means}


def _predictions(prefix: str, log_probabilities: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return whether each target is predicted, and its logarithmic loss."""
    return {
        f"{prefix}accuracy": (log_probabilities.argmax(1) == targets).double(),
        f"{prefix}loss": functional.nll_loss(log_probabilities, targets, reduction="none"),
    }
