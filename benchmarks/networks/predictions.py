"""What a language model predicts: its losses on texts, and training towards the dense model."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tables import markdown_table
from matfact.torch import distill, soft_cross_entropy


def teach(model: Any, dense: Any, batches: list[Any]) -> dict[str, Any]:
    """Train the stored values to give the predictions of the dense model, in mixed precision."""
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        record = distill(model, dense, batches, distance=soft_cross_entropy(1.0))
    return {
        "divergences": [-(record.first_score or math.nan), *(-score for score in record.scores)],
        "training_tokens": sum(batch["input_ids"].numel() for batch in batches),
        "training_seconds": time.process_time() - start,
    }


def quality(model: Any, tests: dict[str, Tensor]) -> dict[str, Any]:
    """Return the loss of each window of the tests, and the perplexity of the first."""
    found = {name: losses(model, tokens) for name, tokens in tests.items()}
    return {"perplexity": math.exp(statistics.fmean(next(iter(found.values())))), "losses": found}


@torch.no_grad()
def losses(model: Any, windows: Tensor) -> list[float]:
    """Return the mean logarithmic loss of each window, evaluated separately."""
    found = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        found.append(float(nn.functional.cross_entropy(logits, window[1:])))
    return found


def excess(found: list[float], dense: list[float]) -> tuple[float, float]:
    """Return the mean of the loss beyond the dense model's over windows, and its standard error."""
    beyond = [a - b for a, b in zip(found, dense, strict=True)]
    return statistics.fmean(beyond), statistics.stdev(beyond) / math.sqrt(len(beyond))


def table(found: dict[tuple[str, float], dict[str, Any]], dense: dict[str, list[float]]) -> str:
    """Return the excess logarithm on each text, with its standard error over windows."""
    lines = []
    for (method, density), result in found.items():
        if "losses" not in result:  # of an earlier version
            continue
        pairs = [excess(result["losses"][name], each) for name, each in dense.items()]
        seconds = result.get("training_seconds")
        lines.append([
            f"{method}, {density:.0%}", *(f"{mean:.3f} ± {error:.3f}" for mean, error in pairs),
            "–" if seconds is None else f"{seconds / 60:.0f}",
        ])  # fmt: skip
    return markdown_table(["excess logarithm", *dense, "CPU minutes of training"], lines)
