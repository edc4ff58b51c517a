"""Speed of whole networks: text generation, sentence embedding, image classification.

Measures SmolLM2-135M (tokens a second of the prompt and of decoding, with a cache), the encoder of
all-MiniLM-L6-v2 (sentences a second) and ResNet-20 (images a second): dense in float32 and
bfloat16, with PyTorch's dynamic int8, and with two sparse factors a layer, on random supports,
since fitted values take the same time. All forms take turns in one process, so that other programs
slow down all of them. Ratios are medians over the turns. Run it with ``--threads 2``; fewer threads
are measured too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.busy import busy
from benchmarks.networks import encoder, language_model, models, smollm2
from benchmarks.tables import markdown_table
from matfact._files import write_atomically
from matfact.operators import DenseFactor, FactorProduct, SparseFactor
from matfact.torch import FactorizedConv, FactorizedLinear, keep_unchecked

DENSITIES = (0.5, 0.3, 0.25)
VALUE_BITS = (32, 16, 8)
#: Ending of forms whose output layer has values of 8 bits, as PyTorch's dynamic int8 has.
OUTPUT = " and output"
#: Batch sizes of each network.
BATCHES = {"smollm2": (1, 8), "encoder": (1, 32), "resnet20": (1, 32), "tiny": (1, 8)}
#: How the names of factorized layers begin; the output layer stays dense, but in forms with it.
LAYERS = {"smollm2": "model.layers", "encoder": "encoder.layer", "resnet20": "", "tiny": "model."}
SEED = 0
_PEAK = Path("/proc/self/status")

Phases = dict[str, tuple[int, Callable[[], object]]]  #: what each call processes, and the call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--networks", nargs="+", default=list(BATCHES)[:3], choices=BATCHES)
    add("--forms", nargs="+", default=list(forms()), help="forms besides dense float32")
    add("--batches", type=int, nargs="+", help="batch sizes (the networks' own)")
    add("--prompt", type=int, default=512, help="tokens of the prompt")
    add("--tokens", type=int, default=16, help="tokens to generate in a turn")
    add("--turns", type=int, default=7, help="timings of each form")
    add("--beside", type=int, default=0, help="other processes that keep a core busy each")
    add("--output", type=Path, help="output folder (build/generate)")
    add("--resume", action="store_true", help="keep existing rows and measure the rest")
    add("--quick", action="store_true", help="smoke test with an untrained model of two layers")
    add("--unchecked", action="store_true", help="without the check for untracked writes")
    add("--peaks", action="store_true", help="peak memory too, in a process for each form")
    add("--peak", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.quick:
        options.networks, options.batches = ["tiny"], [1]
        options.prompt, options.tokens, options.turns = 8, 2, 2
    check(options)
    if options.peak:
        print(json.dumps(peak(options.networks[0], options.peak, options)))
        return 0
    folder = options.output or Path("build") / ("generate-quick" if options.quick else "generate")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "generate.json"
    rows = json.loads(path.read_text())["rows"] if options.resume and path.exists() else []
    conditions = machine.describe(options.threads)
    for name in options.networks:
        for row in measured(name, rows, options):
            rows.append(row)
            content = {"conditions": conditions, "rows": rows}
            write_atomically(path, json.dumps(content, indent=1, default=str).encode())
    text = markdown(conditions, rows, options)
    (folder / "generate.md").write_text(text)
    print(text, end="")
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ``SystemExit`` for forms that there are not, and for numbers too small."""
    if unknown := [form for form in options.forms if form not in forms()]:
        raise SystemExit(f"--forms must be among {', '.join(forms())}, got {unknown[0]!r}.")
    numbers = {"prompt": options.prompt, "tokens": options.tokens, "turns": options.turns}
    for name, number in [*numbers.items(), *(("batches", each) for each in options.batches or ())]:
        if number < 1:
            raise SystemExit(f"--{name} must be at least 1, got {number}.")


def forms() -> Iterator[str]:
    """Yield the names of all forms besides dense float32."""
    yield from ("dense bfloat16", "dense int8")
    yield from (f"{density} {bits} bits" for bits in VALUE_BITS for density in DENSITIES)
    yield "rounded 8 bits"
    yield from (f"{density} 8 bits{OUTPUT}" for density in ("rounded", *DENSITIES))


def measured(
    name: str, known: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a row for each batch size, number of threads, form and phase that is not `known`."""
    done = {(row["network"], row["batch"], row["threads"]) for row in known}
    cells = [
        (batch, count)
        for count in range(options.threads, 0, -1)
        for batch in options.batches or BATCHES[name]
        if (name, batch, count) not in done
    ]
    if not cells:
        return
    model = network(name)
    if model is None:
        print(f"{name}: its package is not installed, left out.")
        return
    chosen = [form for form in options.forms if has_form(model, form)]
    networks: dict[str, Any] = {"dense 32 bits": model}
    networks |= {form: built(name, model, form) for form in chosen}
    if options.unchecked:
        for form in chosen:
            keep_unchecked(networks[form])
    peaks = {form: _peak_of(name, form, options) for form in networks}
    sizes = {form: stored(network) for form, network in networks.items()}
    for batch, count in cells:
        with machine.threads(count), busy(options.beside):
            seconds = interleaved(name, networks, batch, options)
        load = os.getloadavg()[0]
        for (form, phase), (items, times) in seconds.items():
            base = seconds["dense 32 bits", phase][1]
            ratios = [b / t for b, t in zip(base, times, strict=True)]
            yield {
                "network": name, "batch": batch, "threads": count, "form": form, "phase": phase,
                "rate": items / statistics.median(times), "speedup": statistics.median(ratios),
                "best": min(base) / min(times), "seconds": times, "load": load,
                "peak_bytes": peaks[form], "bytes": sizes[form],
            }  # fmt: skip


def network(name: str) -> Any:
    """Return a dense network in float32, None if its package is missing."""
    if name == "tiny":
        return language_model.tiny_task().model
    if name == "resnet20":
        torch.manual_seed(SEED)
        return models.build("resnet20", image_size=28).eval()
    try:
        return smollm2.network()[0] if name == "smollm2" else encoder.network()[0]
    except (FileNotFoundError, ImportError):
        return None


def has_form(model: Any, form: str) -> bool:
    """Whether a form differs from others: that of the output does where there is such a layer."""
    return not form.endswith(OUTPUT) or hasattr(model, "lm_head")


def built(name: str, model: Any, form: str) -> Any:
    """Return a form of a network; parameters that are the same are shared."""
    if form == "dense 32 bits":
        return model
    if form.startswith("dense "):
        return models.of_torch(model, form.removeprefix("dense "))
    first, digits = form.split()[:2]
    density, bits = None if first == "rounded" else float(first), int(digits)
    rng = np.random.default_rng(SEED)
    # Changing the dtype would change shared parameters too.
    shared = {} if bits == 16 else {id(p): p for p in model.parameters()}
    small = copy.deepcopy(model, shared)
    for path, layer in list(small.named_modules()):
        is_output = path == "lm_head"
        if not (path.startswith(LAYERS[name]) or (is_output and form.endswith(OUTPUT))):
            continue
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and getattr(layer, "in_channels", 0) != 1:
            chosen = None if is_output else density
            small.set_submodule(path, _factorized(layer, chosen, bits, rng))
    return small.to(torch.bfloat16) if bits == 16 else small


def _factorized(
    layer: Any, density: float | None, bits: int, rng: np.random.Generator
) -> nn.Module:
    """Return a layer with random factors, or with its own weight if there is no density."""
    weight = layer.weight.detach().reshape(len(layer.weight), -1)
    product = (
        _random(weight.shape, density, rng)
        if density
        else FactorProduct([DenseFactor(weight.numpy())])
    )
    if bits == 8:
        product = product.quantized(8)
    if isinstance(layer, nn.Conv2d):
        return FactorizedConv.from_products(layer, [product]).eval()
    return FactorizedLinear(product, layer.bias).eval()


def _random(shape: tuple[int, int], density: float, rng: np.random.Generator) -> FactorProduct:
    """Return two random sparse factors, the smaller of which is square."""
    rows, columns = shape
    side, total = min(rows, columns), density * rows * columns
    shares = side**2 / (side**2 + rows * columns)
    shapes = [(rows, side), (side, columns)]
    square = rows >= columns  # the index of the square factor
    counts = [total * (1 - shares), total * (1 - shares)]
    counts[square] = total * shares
    factors = [_sparse(shape, round(n), rng) for shape, n in zip(shapes, counts, strict=True)]
    return FactorProduct(factors)


def _sparse(shape: tuple[int, int], count: int, rng: np.random.Generator) -> SparseFactor:
    size = shape[0] * shape[1]
    places = np.sort(rng.permutation(size)[: max(1, min(size, count))])
    values = rng.standard_normal(len(places), dtype=np.float32) * (shape[0] / len(places)) ** 0.5
    return SparseFactor.from_locations(values, places, shape)


def interleaved(
    name: str, networks: dict[str, Any], batch: int, options: argparse.Namespace
) -> dict[tuple[str, str], tuple[int, list[float]]]:
    """Return what a call processes, and the seconds of each turn, of each form and phase."""
    phases = {form: calls(name, model, batch, options) for form, model in networks.items()}
    found: dict[tuple[str, str], tuple[int, list[float]]] = {}
    for turn in range(-1, options.turns):  # the first compiles and prepares
        for form, steps in phases.items():
            for phase, (items, call) in steps.items():
                start = time.perf_counter()
                call()
                if turn >= 0:
                    seconds = time.perf_counter() - start
                    found.setdefault((form, phase), (items, []))[1].append(seconds)
    return found


def calls(name: str, model: Any, batch: int, options: argparse.Namespace) -> Phases:
    """Return the phases of a network, in their order."""
    torch.manual_seed(SEED)
    if name == "resnet20":
        images = torch.randn(batch, 1, 28, 28, dtype=next(model.parameters()).dtype)
        return {"images": (batch, lambda: _inferred(model, images))}
    vocabulary = model.config.vocab_size
    if name == "encoder":
        sentences = torch.randint(vocabulary, (batch, 24))
        return {"sentences": (batch, lambda: _inferred(model, sentences))}
    prompt = torch.randint(vocabulary, (batch, options.prompt))
    state: list[Any] = []

    def read() -> None:
        state[:] = _step(model, prompt, None)

    def decode() -> None:
        for _ in range(options.tokens):
            state[:] = _step(model, *state)

    return {
        "prompt": (prompt.numel(), read),
        "decoding": (batch * options.tokens, decode),
    }


@torch.inference_mode()
def _inferred(model: Any, x: Tensor) -> object:
    return model(x)


@torch.inference_mode()
def _step(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return the most probable next tokens and the cache."""
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


def stored(model: Any) -> float | None:
    """Return the bytes of a file's factors ÷ those of their dense matrices in float32, if any."""
    products: list[FactorProduct] = []
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):  # those of convolutions too
            products.append(layer.to_product())
    entries = sum(rows * columns for rows, columns in (product.shape for product in products))
    return sum(p.nbytes("stored") for p in products) / (4 * entries) if products else None


def _peak_of(name: str, form: str, options: argparse.Namespace) -> int | None:
    """Return the peak memory of a form in a process of its own, where the system tells it."""
    if not options.peaks or not _PEAK.exists():
        return None
    command = [
        sys.executable, "-m", "benchmarks", "generate", "--threads", str(options.threads),
        "--networks", name, "--peak", form,
        "--prompt", str(options.prompt), "--tokens", str(options.tokens),
    ]  # fmt: skip
    return int(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))


def peak(name: str, form: str, options: argparse.Namespace) -> int:
    """Return the bytes that this process holds at most while it applies a form, batch 1.

    What building takes does not count, nor the dense weights that were replaced.
    """
    model = built(name, network(name), form)
    phases = calls(name, model, 1, options)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _, call in phases.values():
        call()
    line = next(line for line in _PEAK.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def markdown(
    conditions: dict[str, Any], rows: list[dict[str, Any]], options: argparse.Namespace
) -> str:
    """Return a table for each network, batch size and number of threads."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    checked = "unchecked" if options.unchecked else "checked for writes"
    lines = [
        f"{conditions['cpu']}. {versions}. Seed {SEED}, random supports and values, prompt of "
        f"{options.prompt} tokens, {options.tokens} tokens a turn, {options.turns} turns, "
        f"{options.beside} busy processes beside, layers {checked}. Items a "
        "second (median) and, in brackets, the median ratio to dense float32 in the same turn, "
        "and that of the best turns.",
    ]
    for cell in dict.fromkeys((r["network"], r["batch"], r["threads"]) for r in rows):
        chosen = [r for r in rows if (r["network"], r["batch"], r["threads"]) == cell]
        phases = list(dict.fromkeys(r["phase"] for r in chosen))
        table = []
        for form in dict.fromkeys(r["form"] for r in chosen):
            found = {r["phase"]: r for r in chosen if r["form"] == form}
            held = found[phases[0]]["peak_bytes"]
            memory = "–" if held is None else f"{held / 2**20:.0f}"
            table.append((form, *(_cell(found[phase]) for phase in phases), memory))
        title = f"{cell[0]}, batch {cell[1]}, {cell[2]} thread(s), load {chosen[0]['load']:.1f}"
        content = markdown_table(("form", *phases, "peak MiB"), table).rstrip()
        lines += ["", f"### {title}", "", content]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return f"{row['rate']:.4g} ({row['speedup']:.2f}, {row['best']:.2f})"
