"""Draw the figures of the documentation's studies from ``docs/data/``, in the package's style."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.datafiles import fits, read
from matfact._figures import GREY, label_lines, style

IMAGES = Path(__file__).parents[1] / "docs" / "images"

Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, ...]]  #: x, y and, where it is known, the deviation of y


class Panel(NamedTuple):
    """One panel of a figure: points by name, and what the axes are called."""

    title: str
    lines: dict[str, Points]
    axes: dict[str, Any]
    level: float | None = None  #: of a line to compare with


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Write the figure that `draw` returns as SVG, for light and dark pages."""
    with mpl.rc_context(style()):
        draw().savefig(path, format="svg", transparent=True, metadata={"Date": None})


def drawn(panels: Sequence[Panel], columns: int = 2) -> Figure:
    """Draw panels side by side, with the names of lines at their ends."""
    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * n_rows), layout="constrained")
    for axes, panel in zip(figure.subplots(n_rows, columns).flat, panels, strict=True):
        for name, points in panel.lines.items():
            x, y, *deviation = zip(*points, strict=True)
            axes.errorbar(x, y, *deviation, capsize=2, label=name)
        axes.set(title=panel.title, **panel.axes)
        if panel.level is not None:
            axes.axhline(panel.level, color=GREY, linestyle="--", linewidth=1.2)
        if axes.get_xscale() == "log":
            _plain_ticks(axes, sorted({p[0] for points in panel.lines.values() for p in points}))
        label_lines(axes)
    return figure


def _plain_ticks(axes: Axes, values: list[float]) -> None:
    """Write plain numbers on a logarithmic axis: the values, or ones and threes."""
    if min(b / a for a, b in itertools.pairwise(values)) > 1.4:
        axes.set_xticks(values, [f"{value:g}" for value in values])
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
    axes.xaxis.set_minor_locator(NullLocator())


def across(rows: Rows, name: str, scale: float = 1.0) -> dict[str, Points]:
    """Return a line for each row, whose fields are ``at X`` with X a number or a percentage."""
    lines: dict[str, Points] = {}
    for row in rows:
        found = {key: re.fullmatch(r"at (\d+(?: \d+)?)(?: percent)?", key) for key in row}
        lines[row[name]] = [
            (float(place[1].replace(" ", ".")) * scale, row[key])
            + ((row[f"{key} ±"],) if f"{key} ±" in row else ())
            for key, place in found.items()
            if place and row[key] is not None
        ]
    return lines


def down(rows: Rows, x: Callable[[Any], float], fields: Mapping[str, str]) -> dict[str, Points]:
    """Return a line for each of `fields`, by name, with a point for each row."""
    return {
        name: [(x(row), row[field]) for row in rows if row.get(field) is not None]
        for name, field in fields.items()
    }


def _rows(file: str, part: str, **where: Any) -> Rows:
    rows = read(IMAGES.parent / "data" / f"{file}.json")["sets"][part]["rows"]
    return [row for row in rows if fits(row, where)]


def projection() -> Figure:
    side = {"xlabel": "side of the matrix", "ylabel": "error ÷ magnitude pruning"}
    side |= {"xscale": "log"}
    share = {"xlabel": "density of the first factor", "ylabel": "error ÷ magnitude pruning"}
    parts = {
        "methods": ("methods, 25 % of the values", "method by size", side),
        "settings": ("settings of double sparse factorization", "setting by size", side),
        "first-factor": ("first factor, 40 % of the values", "by by density", share),
        "starts": ("starts of the published procedure", "start by size", side),
    }
    return drawn(
        [
            Panel(title, across(_rows("study-projection", part), name), axes, level=1.0)
            for part, (title, name, axes) in parts.items()
        ]
    )


def sparse_inference() -> Figure:
    fields = {
        f"{who}, {count} {'matrix' if count == 'one' else 'matrices'}": f"{key} {count} ratio"
        for who, key in (("matfact", "matfact"), ("SciPy", "scipy csr"))
        for count in ("one", "two")
    }
    axes = {"xlabel": "stored values, %", "ylabel": "time ÷ dense", "xscale": "log"}
    return drawn(
        [
            Panel(
                f"batch of {batch}",
                down(_rows("study-sparse-inference", "layers", batch=batch), _stored, fields),
                axes,
                level=1.0,
            )
            for batch in (1, 16, 64)
        ],
        columns=3,
    )


def _stored(row: Any) -> float:
    return float(row["stored"])


def pruning_butterfly() -> Figure:
    fields = {
        "random": "random",
        "magnitude": "magnitude",
        "SNIP": "snip",
        "GraSP": "grasp",
        "SynFlow": "synflow",
    }
    axes = {"xlabel": "share kept", "ylabel": "accuracy, %", "xscale": "log"}
    return drawn(
        [
            Panel(
                f"{name}, {layers.replace('head', 'but the head')} layers",
                down(
                    _rows("study-pruning-butterfly", part, layers=layers, pruned="dense layers"),
                    lambda row: 10 ** row["keep b"],
                    fields,
                ),
                axes,
            )
            for part, name in (("mlp-accuracy", "MLP"), ("vgg-accuracy", "VGG"))
            for layers in ("dense", "butterfly head")
        ]
    )


def psm() -> Figure:
    kinds = {
        "PSM, two factors": r"PSM Q=2 .*",
        "PSM, three factors": r"PSM Q=3 .*",
        "DSF": r"DSF .*",
        "hard pruning": r"hard pruning .*",
        "tensor train": r"tensor train .*",
        "Tucker": r"Tucker.*",
    }
    axes = {"xlabel": "weights stored", "ylabel": "accuracy, %", "xscale": "log"}
    titles = {"lenet": "LeNet", "vgg": "VGG"}

    def lines(part: str) -> dict[str, Points]:
        return {
            kind: sorted(
                (row["weights"], row["accuracy percent"])
                for row in _rows("study-psm", part)
                if re.fullmatch(pattern, row["method"])
            )
            for kind, pattern in kinds.items()
        }

    return drawn([Panel(title, lines(part), axes) for part, title in titles.items()])


def low_rank() -> Figure:
    axes = {"xlabel": "sparsity, %", "ylabel": "accuracy"}
    panels = []
    for part, title in (("mlp", "MLP"), ("vgg-new-statistics", "VGG, new statistics")):
        lines = across(_rows("study-low-rank", part, blocking="none"), "score")
        lines |= across(_rows("study-low-rank", part, blocking="searched"), "score")
        panels.append(Panel(title, lines, axes))
    return drawn(panels)


def neuron_selection() -> Figure:
    shares = {"tenth": 0.1, "quarter": 0.25, "half": 0.5}
    methods = {"i-SpaSP": "i spasp", "gradient": "gradient variant", "closed form": "closed form"}
    axes = {"xlabel": "share of units kept", "ylabel": "relative error of the outputs"}
    return drawn(
        [
            Panel(
                f"{row['data']}, {row['hidden']} units",
                {
                    name: [(share, row[f"{key} {part}"]) for part, share in shares.items()]
                    for name, key in methods.items()
                },
                {**axes, "ylim": (0, None)},
            )
            for row in _rows("study-neuron-selection", "networks")
        ],
        columns=3,
    )


FIGURES = {
    "study-low-rank": low_rank,
    "study-neuron-selection": neuron_selection,
    "study-projection": projection,
    "study-pruning-butterfly": pruning_butterfly,
    "study-psm": psm,
    "study-sparse-inference": sparse_inference,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder for the figures")


def run(options: argparse.Namespace) -> int:
    options.output.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        save(draw, options.output / f"{name}.svg")
    return 0
