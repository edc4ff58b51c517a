"""Picture of the errors of layers over the depth of a network, as SVG within a page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from matfact import _html

#: Shapes of 8 pixels, so that series are told apart without their colours.
_SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.5,-3.5h7v7h-7z",
    "M0,-4.5L4.5,3.5H-4.5z",
    "M0,-5L5,0L0,5L-5,0z",
    "M0,4.5L4.5,-3.5H-4.5z",
    "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-4.5,0L3.5,4.5V-4.5z",
    "M4.5,0L-3.5,4.5V-4.5z",
)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 260, 50, 14, 12, 36
_PLACES = re.compile(r"(?:^|.*\.)\d+\.(?=[^.])")

Point = tuple[str, float | None]


def depth_chart(points: Sequence[Point], label: str) -> str:
    """Return a picture with a point for each error, in the order of the network.

    Layers of the same name but for their block form a series, if there are few such names.

    Parameters
    ----------
    points : sequence of (str, float or None)
        Names of layers and their errors. Layers without one leave a gap.
    label : str
        What the errors are.
    """
    known = [(i, name, e) for i, (name, e) in enumerate(points) if e is not None]
    known = [(i, name, error) for i, name, error in known if math.isfinite(error)]
    if len(known) < 2:
        return ""
    top = max(error for _, _, error in known) or 1.0
    step = _step(top)
    top = step * math.ceil(top / step)
    across = (_WIDTH - _LEFT - _RIGHT) / max(1, len(points) - 1)

    def place(i: int, error: float) -> tuple[float, float]:
        return _LEFT + i * across, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - error / top)

    drawn = []
    series = _series([name for _, name, _ in known])
    for number, names in enumerate(series.values()):
        color = f"var(--c{number})"
        of_series = [(*place(i, error), name, error) for i, name, error in known if name in names]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in of_series)
        drawn.append(f'<polyline points="{line}" style="stroke:{color}"/>')
        drawn += [
            f'<path d="{_SHAPES[number]}" transform="translate({x:.1f} {y:.1f})" '
            f'style="fill:{color}"><title>{_html.escape(name)}: {error:.4f}</title></path>'
            for x, y, name, error in of_series
        ]
    return (
        f'<h2>Errors over depth</h2><div class="scroll"><svg class="chart" role="img" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{_html.escape(label)} of each layer">'
        f"{_axes(top, step, label)}{''.join(drawn)}</svg></div>{_legend(list(series))}"
    )


def _series(names: Sequence[str]) -> dict[str, set[str]]:
    """Return the names by what they are called within their block, or all of them together."""
    series: dict[str, set[str]] = {}
    for name in names:
        series.setdefault(_PLACES.sub("", name), set()).add(name)
    repeated = {own: held for own, held in series.items() if len(held) > 1}
    others = set(names).difference(*repeated.values())
    if not repeated or len(repeated) + bool(others) > len(_SHAPES):
        return {"": set(names)}
    return repeated | ({"other layers": others} if others else {})


def _step(top: float) -> float:
    """Return a round number, of which 2 to 5 reach the top."""
    power = 10.0 ** math.floor(math.log10(top))
    return next(power * n for n in (0.2, 0.5, 1.0, 2.0) if power * n * 5 >= top)


def _axes(top: float, step: float, label: str) -> str:
    """Return the lines at round errors, with numbers, and what the axes are."""
    parts = []
    for i in range(round(top / step) + 1):
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - i * step / top)
        parts.append(
            f'<path class="grid" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{i * step:.4g}</text>'
        )
    text = _html.escape(f"{label}; layers in the order of the network →")
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 10}">{text}</text>')
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = "".join(
        f'<li><svg width="12" height="12" viewBox="-6 -6 12 12" aria-hidden="true">'
        f'<path d="{_SHAPES[i]}" style="fill:var(--c{i})"/></svg> {_html.escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'
