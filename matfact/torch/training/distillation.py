"""Distillation: a compressed network is trained to give what the dense network gives."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from matfact._checks import check_positive_int
from matfact._progress import Bar
from matfact.report import CompressionReport
from matfact.torch.layers._factors import FactorModule
from matfact.torch.running._batches import (
    attended,
    checked,
    device_of,
    eval_mode,
    forward,
    moved,
    unwrapped,
)
from matfact.torch.running._offloaded import refuse_offloaded
from matfact.torch.running._random import RandomState, drawing, generators_of
from matfact.torch.running._tensors import (
    check_trainable,
    is_filled,
    output_tensor,
    outside_inference_mode,
)
from matfact.torch.running._traces import Traces
from matfact.torch.training._loop import FineTuning, train
from matfact.torch.training._values import (
    adam,
    first_tensor,
    relative_errors,
    rows,
    slow_down,
    stored_values,
)
from matfact.torch.training.finetune import Distance

#: Parts of a training; the network is measured after each.
PARTS = 8
#: A batch of so many is held out, but not more batches than this in all.
EVERY, MOST_ASIDE = 5, 16


@outside_inference_mode
def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    learning_rate: float = 0.003,
    distance: Distance | None = None,
    hidden: float = 0.3,
    report: CompressionReport | None = None,
    progress: bool | Callable[[int, float, float | None], None] | None = False,
) -> FineTuning:
    """Train a compressed network to give the outputs of the dense one, without labels.

    Stored values, biases and norms are trained with Adam; supports and all other parameters are
    fixed. Blocks, such as transformer layers, learn to give the outputs of the dense ones too. One
    batch in five, at most 16, is held out. After each eighth of the training the network is
    measured on them. If it is no better, training goes back to its best state and continues at a
    quarter of the learning rate. New text helps more than further epochs.

    Parameters
    ----------
    model : torch.nn.Module
        The compressed network, changed in place. It runs in eval mode, without dropout.
    teacher : torch.nn.Module
        The dense network, with blocks of the same names.
    batches : iterable
        Inputs of the network, as in `Calibration`, at least two. All are kept in memory.
    epochs : int, default=1
        Number of passes over the batches.
    learning_rate : float, default=0.003
        First step relative to the root mean square of each parameter. It falls to zero as a cosine.
        Each time it is quartered, an eighth of the training is lost.
    distance : callable, optional
        Distance between outputs and those of the teacher, with a row for each token or sample
        without padding; for logits see `soft_cross_entropy`. By default the squared error
        of each row relative to its square.
    hidden : float, default=0.3
        Weight of the mean relative error of the blocks' outputs. Blocks whose outputs have other
        shapes in the two networks do not count.
    report : CompressionReport, optional
        Its steps then tell what this has gained.
    progress : bool or callable, default=False
        As in `fine_tune`; an "epoch" is an eighth of the training.

    Returns
    -------
    FineTuning
        Losses and scores of each eighth. A score is the negative distance of held-out outputs,
        by default their relative error. The final network has the best one.

    Raises
    ------
    ValueError
        If a parameter is invalid, no parameter can be trained, stored values are not in single or
        double precision, there are fewer than two batches, the teacher has other blocks or gives
        outputs of other shapes or NaN, or the report is of another network.

    Warns
    -----
    sklearn.exceptions.ConvergenceWarning
        If an eighth makes the network infinite or NaN, or none makes it better.

    Examples
    --------
    >>> import torch
    >>> from matfact.torch import compress, distill
    >>> from torch.nn import Linear, ReLU, Sequential
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> dense = Sequential(Linear(32, 64), ReLU(), Linear(64, 8))
    >>> small, report = compress(dense, "magnitude", density=0.5)
    >>> record = distill(small, dense, list(torch.randn(20, 16, 32)), report=report)
    >>> record.scores[-1] > record.first_score
    True
    """
    if report is not None:
        report.check_fits(name for name, _ in model.named_modules(remove_duplicate=False))
    bar = Bar(progress)
    drawn = [batch for batch in checked(batches) if is_filled(batch)]
    parameters = _trained(model)
    _check(model, teacher, drawn, parameters, epochs=epochs, rate=learning_rate, hidden=hidden)
    step = max(EVERY, math.ceil(len(drawn) / MOST_ASIDE))
    aside = drawn[1::step]
    fitted = [batch for i, batch in enumerate(drawn) if i % step != 1]
    n_steps = epochs * len(fitted)
    parts = _Parts(fitted, n_steps)
    optimizer, schedule = adam(parameters, learning_rate, n_steps)
    with (
        eval_mode(teacher),
        _Pair(model, teacher, distance, hidden) as pair,
        _only(model, parameters),
    ):
        record = train(
            model, parts, pair, optimizer, schedule, epochs=math.ceil(n_steps / parts.size),
            validate=lambda model: -pair.error(aside), patience=None, bar=bar, training=False,
            retreat=functools.partial(slow_down, optimizer, schedule),
        )  # fmt: skip
    if not record.best_epoch:
        message = "The network is as before, since no part of the training made it better."
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    if report is not None:
        report.metadata["steps"] = [*report.metadata.get("steps", ()), _summary(record, n_steps)]
    return record


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the stored values, biases and norms that the caller has not frozen."""
    return [parameter for parameter in stored_values(model) if parameter.requires_grad]


def _check(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    parameters: Sequence[nn.Parameter],
    *,
    epochs: int,
    rate: float,
    hidden: float,
) -> None:
    """Raise ``ValueError`` for what cannot be trained, before any work starts."""
    check_trainable(model)
    for network in (model, teacher):
        refuse_offloaded(network)
    check_positive_int("epochs", epochs)
    if not 0 < rate < 1:
        raise ValueError(f"learning_rate must lie between 0 and 1, got {rate}.")
    if not 0 <= hidden < math.inf:
        raise ValueError(f"hidden must be at least 0 and finite, got {hidden}.")
    if len(batches) < 2:
        raise ValueError(
            f"batches must hold at least two, since one is held out, got {len(batches)}."
        )
    if not parameters:
        raise ValueError("model must store values, biases or norms with requires_grad=True.")
    trained = {id(p) for p in parameters}
    if shared := {id(p) for p in teacher.parameters()} & trained:
        name = next(name for name, p in model.named_parameters() if id(p) in shared)
        raise ValueError(f"teacher must have its own parameters, but shares {name!r} with model.")
    for name, parameter in model.named_parameters():
        if id(parameter) in trained and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"model must be in single or double precision to be trained, but {name!r} is "
                f"{parameter.dtype}: use model.float()."
            )


class _Parts:
    """Batches over and over; each iteration goes on where the last one stopped."""

    def __init__(self, batches: Sequence[Any], n_steps: int) -> None:
        self._batches, self.size = itertools.cycle(batches), math.ceil(n_steps / PARTS)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._batches, self.size)


class _Pair(contextlib.ExitStack):
    """The two networks, with the outputs of their blocks.

    Called with the output of the compressed network and its batch, it returns the loss.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, distance: Distance | None, hidden: float
    ) -> None:
        super().__init__()
        self._model, self._teacher, self._distance, self._weight = model, teacher, distance, hidden
        self._found: list[Tensor] = []
        self._wanted: list[Tensor] = []
        self._generators = generators_of(model, teacher)
        known = dict(unwrapped(teacher).named_modules(remove_duplicate=False))
        blocks = dict(_blocks(unwrapped(model))) if hidden else {}
        if blocks and not blocks.keys() & known.keys():
            raise ValueError(
                "teacher must have blocks of the same names as model, such as "
                f"{next(iter(blocks))!r}, but has none: use hidden=0 to compare only outputs."
            )
        self.callback(model.register_forward_pre_hook(self._begin).remove)
        self.callback(Traces(teacher).restore)
        for name, block in blocks.items():
            if name in known:
                self._watch(block, self._found)
                self._watch(known[name], self._wanted)

    def _watch(self, block: nn.Module, outputs: list[Tensor]) -> None:
        def see(block: nn.Module, args: Any, output: Any) -> None:
            with contextlib.suppress(TypeError):  # no tensor among the outputs
                outputs.append(first_tensor(output))

        self.callback(block.register_forward_hook(see).remove)

    def _begin(self, *_: Any) -> None:
        self._found.clear()
        self._wanted.clear()
        self._state = RandomState.now(device_of(self._model), self._generators)

    def __call__(self, output: Any, batch: Any) -> Tensor:
        target = self._target(batch, "a batch to train with")
        loss = self._of(output_tensor(output), target, batch).mean()
        pairs = [(a, b) for a, b in zip(self._found, self._wanted, strict=False)
                 if a.shape == b.shape]  # fmt: skip
        if not pairs:
            return loss
        errors = [relative_errors(*pair, batch, self._model).mean() for pair in pairs]
        return loss + self._weight * torch.stack(errors).mean()

    @torch.no_grad()
    def error(self, batches: Iterable[Any]) -> float:
        """Return the distance of the outputs, or by default their relative error."""
        found = []
        for batch in batches:
            batch = moved(batch, device_of(self._model))
            output = output_tensor(forward(self._model, batch))
            target = self._target(batch, "a held-out batch")
            found.append(self._of(output, target, batch).double().flatten())
        mean = float(torch.cat(found).mean())
        return math.sqrt(mean) if self._distance is None else mean

    @torch.no_grad()
    def _target(self, batch: Any, what: str) -> Tensor:
        """Return the teacher's output; it draws the same random numbers as the network."""
        with drawing(self._state):
            target = output_tensor(forward(self._teacher, batch))
        if bool(attended(target, batch, self._model).isnan().any()):
            raise ValueError(f"teacher must give numbers, but gives NaN for {what}.")
        return target

    def _of(self, output: Tensor, target: Tensor, batch: Any) -> Tensor:
        if output.shape != target.shape:
            raise ValueError(
                "teacher must give outputs of the same shape as model, "
                f"{tuple(output.shape)}, got {tuple(target.shape)}."
            )
        if self._distance is None:
            return relative_errors(output, target, batch, self._model)
        each = (rows(attended(x, batch, self._model)) for x in (output, target))
        return self._distance(*each)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost entries of lists that hold factors, such as transformer layers."""
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: list[str] = []
    for name, module in modules.items():
        if any(name.startswith(f"{outer}.") for outer in chosen) or isinstance(module, lists):
            continue
        is_entry = bool(name) and isinstance(modules[name.rpartition(".")[0]], lists)
        holds = not isinstance(module, FactorModule) and any(
            isinstance(each, FactorModule) for each in module.modules()
        )
        if is_entry and holds:
            chosen.append(name)
            yield name, module


@contextlib.contextmanager
def _only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have only these parameters trained, without gradients afterwards."""
    trained = {id(parameter) for parameter in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        for parameter in parameters:
            parameter.grad = None


def _summary(record: FineTuning, n_steps: int) -> str:
    """Return a line for a report."""
    scores = [math.nan if record.first_score is None else record.first_score, *record.scores]
    first, best = -scores[0], -scores[record.best_epoch]
    return f"distilled in {n_steps} steps (held-out error of outputs {first:.4f} → {best:.4f})"
