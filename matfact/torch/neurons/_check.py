"""Check by trial whether units of a block can be removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from matfact.torch.calibration.statistics import layer_input
from matfact.torch.layers._matricized import matricized
from matfact.torch.neurons._blocks import NeuronBlock
from matfact.torch.neurons._cut import cut_units, modules_of, way_back, weight_on
from matfact.torch.neurons._trial import Trial, channel_axis, removed
from matfact.torch.running._tensors import samplewise, tensors_in

#: Inputs of the consumer from the kept units, and outputs of the network.
_Run = tuple[list[Tensor], list[Tensor]]


def is_cuttable(layer: nn.Module) -> bool:
    """Whether a layer has a dense real weight, which can be narrowed."""
    weight = layer._parameters.get("weight")
    return (
        matricized(layer) is not None
        and weight is not None
        and weight.is_floating_point()
        and getattr(layer, "groups", 1) == 1
    )


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a layer, including kernel positions."""
    view = matricized(layer)
    assert view is not None
    rows, columns = view.matrices()[0].shape
    return rows, columns


def objection(trial: Trial, block: NeuronBlock) -> str | None:
    """Return why a block cannot be pruned, or None if it can.

    Without some units, the network must compute the same as with zeros in their place at the
    consumer, and the consumer must see the other units unchanged. This is tested both for the
    actual units and for random values in their place, to include units that are inactive on this
    batch.

    Parameters
    ----------
    trial : Trial
        The network, in eval mode, and a batch.
    block : NeuronBlock
        The block.
    """
    if reason := _mismatch(trial.model, block):
        return reason
    trace = trial.follow(block.producers, torch.arange(block.n_units))
    if not trace.closed or list(trace.read) != [block.consumer]:
        return "something else reads its units too"
    for kept, random in _subsets(block.n_units):
        expected, found = (
            _run(trial, block, kept, random, cut) for cut in (_ignore_units, _cut_units)
        )
        if found is None or expected is None or not _agree(found, expected, trial.model):
            return f"without {block.n_units - len(kept)} of its units, its outputs change"
    return None


def _mismatch(model: nn.Module, block: NeuronBlock) -> str | None:
    """Return why a block is structurally impossible, or None."""
    modules = modules_of(model, block)
    ends = modules[: len(block.producers)], modules[-1]
    if not all(is_cuttable(layer) for layer in (*ends[0], ends[1])):
        return "its layers must be dense and have torch's own forward"
    if any(shape_of(layer)[0] != block.n_units for layer in ends[0]):
        return f"its producers do not have {block.n_units} outputs"
    if shape_of(ends[1])[1] != block.n_units * block.width:
        return f"its consumer does not have {block.n_units * block.width} inputs"
    own = {id(p) for module in modules for p in module.parameters(recurse=False)}
    others = (m for m in model.modules() if not any(m is module for module in modules))
    if any(id(p) in own for m in others for p in m.parameters(recurse=False)):
        return "other modules share its parameters"
    return None


def _subsets(n_units: int) -> Iterator[tuple[Tensor, bool]]:
    """Yield units to keep, and whether to randomize them; each unit is left out once."""
    order = torch.randperm(n_units, generator=torch.Generator().manual_seed(0))
    half, rest = order[: n_units // 2].sort().values, order[n_units // 2 :].sort().values
    middle = torch.arange(n_units) != n_units // 2
    yield half, False
    yield from ((half, True), (rest, True), (torch.nonzero(middle).flatten(), True))


def _run(
    trial: Trial, block: NeuronBlock, kept: Tensor, random: bool, change: Callable[..., Any]
) -> _Run | None:
    """Run the network with a `change` and random units; return None if that fails."""
    restore = way_back(modules_of(trial.model, block))
    inputs: list[Tensor] = []
    handles = _randomized(trial.model, block, kept, cut=change is _cut_units) if random else []
    try:
        handles.append(change(trial.model, block, kept, inputs))
        return inputs, trial.run()
    except Exception:  # the network's code may fail in any way on other shapes
        return None
    finally:
        with removed(handles):
            restore()


def _ignore_units(model: nn.Module, block: NeuronBlock, kept: Tensor, inputs: list[Tensor]) -> Any:
    """Zero all units but `kept` at the consumer."""
    consumer = model.get_submodule(block.consumer)

    def ignore(layer: Any, args: Any, kwargs: Any) -> Any:
        x = layer_input(args, kwargs)
        each = block.width // math.prod(getattr(layer, "kernel_size", ()))
        places = (kept[:, None] * each + torch.arange(each)).flatten().to(x.device)

        def ignored(y: Tensor) -> Tensor:
            inputs.append(y.index_select(channel_axis(layer), places))
            return torch.zeros_like(y).index_copy(channel_axis(layer), places, inputs[-1])

        return (samplewise(ignored, x), *args[1:]), {}

    return consumer.register_forward_pre_hook(ignore, with_kwargs=True)


def _cut_units(model: nn.Module, block: NeuronBlock, kept: Tensor, inputs: list[Tensor]) -> Any:
    """Remove all units but `kept`."""
    cut_units(model, block, kept, weight_on(model, block, kept))
    consumer = model.get_submodule(block.consumer)
    return consumer.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.extend(tensors_in(layer_input(args, kwargs).clone())),
        with_kwargs=True,
    )


def _randomized(model: nn.Module, block: NeuronBlock, kept: Tensor, cut: bool) -> list[Any]:
    """Replace the outputs of the producers by random numbers."""
    source = torch.Generator().manual_seed(0)

    def write(layer: Any, args: Any, output: Tensor) -> Tensor:
        axis = channel_axis(layer)

        def random(y: Tensor) -> Tensor:
            shape = [*y.shape]
            shape[axis] = block.n_units
            values = torch.randn(shape, generator=source).to(y)
            return values.index_select(axis, kept.to(y.device)) if cut else values

        return samplewise(random, output)

    return [model.get_submodule(name).register_forward_hook(write) for name in block.producers]


def _agree(found: _Run, expected: _Run, model: nn.Module) -> bool:
    """Whether two runs have the same consumer inputs and outputs, up to rounding.

    Products of other sizes round differently, and GPUs may use fewer digits than the dtype has.
    """
    pairs = [*zip(found[0], expected[0], strict=False), *zip(found[1], expected[1], strict=False)]
    if not expected[0] or [len(f) for f in found] != [len(e) for e in expected]:
        return False
    dtypes = {t.dtype for run in expected for t in run if t.is_floating_point()}
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return all(_is_close(f, e, min(0.1, 10 * coarsest**0.5)) for f, e in pairs)


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether all differences are at most `tolerance` times the largest entry."""
    if found.shape != expected.shape:
        return False
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = (torch.nan_to_num(t.detach().cpu().to(wide)) for t in (found, expected))
    return not b.numel() or bool((a - b).abs().max() <= tolerance * b.abs().max())
