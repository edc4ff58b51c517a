"""Progress of long work: calls of a function, or a bar with the seconds left.

The bar is shown on standard error if that is a terminal, or in the notebook. Elsewhere nothing is
written; the log tells of each step too.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from matfact._tables import end_of
from matfact._text import printable

#: A terminal that has gone must not cost the result.
_LOST = contextlib.suppress(OSError)
#: What the parameter `progress` of a function may be.
Told = bool | Callable[..., Any] | None


class Step(NamedTuple):
    """Finished work.

    Attributes
    ----------
    name : str
        Of the layer.
    kind : str
        Its method. Steps of a kind take time in proportion to their work.
    work : float
        In proportion to FLOPs; 0 if the step took no time.
    seconds : float or None
        That its own work took, if known.
    error : float or None
        Relative error, if there is one.
    entries : int
        Weight of the error in the mean.
    """

    name: str
    kind: str = ""
    work: float = 1.0
    seconds: float | None = None
    error: float | None = None
    entries: int = 1


class Forecast:
    """Seconds left, from the work left of each kind and the time that such work has taken."""

    def __init__(self) -> None:
        self._left: dict[str, float] = defaultdict(float)
        self._work: dict[str, float] = defaultdict(float)
        self._seconds: dict[str, float] = defaultdict(float)
        self._first: dict[str, tuple[float, float]] = {}
        self._start: float | None = None

    def expect(self, work: Iterable[tuple[str, float]]) -> None:
        """Set the work that is left: pairs of kind and work."""
        self._left = defaultdict(float)
        for kind, amount in work:
            self._left[kind] += amount

    def done(self, step: Step, now: float) -> None:
        """Count a finished step."""
        self._left[step.kind] = max(0.0, self._left[step.kind] - step.work)
        if self._start is None:  # what came before, such as calibration, is not repeated
            self._start = now - (step.seconds or 0.0)
            if step.seconds is None:
                return  # it began at some time before
        seconds = step.work if step.seconds is None else step.seconds
        self._work[step.kind] += step.work
        self._seconds[step.kind] += seconds
        self._first.setdefault(step.kind, (step.work, seconds))

    def left(self, now: float) -> float | None:
        """Return the seconds left, or None before there is enough to tell them from."""
        work, seconds = sum(self._work.values()), sum(self._seconds.values())
        if self._start is None or not work or not seconds or now <= self._start:
            return None
        rates = {kind: self._rate(kind) for kind, done in self._work.items() if done}
        if 2 * sum(n for k, n in self._left.items() if k not in rates) > sum(self._left.values()):
            return None  # methods differ a hundredfold
        left = sum(work_left * rates.get(k, seconds / work) for k, work_left in self._left.items())
        # Several fits may run at once, and there is more to do than fits.
        return left * (now - self._start) / seconds

    def _rate(self, kind: str) -> float:
        """Return the seconds that a unit of work of `kind` takes."""
        work, seconds = self._first[kind]  # it may also have compiled kernels
        later = self._work[kind] - work
        return (self._seconds[kind] - seconds) / later if later else seconds / work


class Bar:
    """Tells of progress in the way that `progress` asks for.

    Parameters
    ----------
    progress : bool, callable or None
        True for a bar; a function, which gets the results; or nothing.
    """

    def __init__(self, progress: Told) -> None:
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise ValueError(f"progress must be True, False or a function, got {progress!r}.")
        self._call = progress if callable(progress) else None
        self._shown = _Shown() if progress is True else None
        self.forecast = Forecast()
        self._began = time.perf_counter()
        self._count, self._total = 0, 0
        self._lost = self._entries = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._shown is not None:
            self._shown.close()

    def expect(self, work: Iterable[tuple[str, float]], total: int, what: str = "") -> None:
        """Set the work that is left, as pairs of kind and work, and the number of steps in all."""
        if self._shown is not None:
            self.forecast.expect(work)
            self._count, self._total = 0, total
            self._show(what or "starting")

    def advance(self, step: Step, *results: Any) -> None:
        """Tell of a finished step: a function gets `results`, if there are any."""
        if self._call is not None and results:
            self._call(*results)
        if self._shown is None:
            return
        self._count += 1
        if step.work:
            self.forecast.done(step, time.perf_counter())
        if step.error is not None and math.isfinite(step.error):
            self._lost += step.entries * step.error**2
            self._entries += step.entries
        self._show(step.name)

    def _show(self, name: str) -> None:
        assert self._shown is not None
        now = time.perf_counter()
        left = self.forecast.left(now)
        share = None if left is None else (now - self._began) / (now - self._began + left)
        error = f"error {math.sqrt(self._lost / self._entries):.3f}" if self._entries else ""
        self._shown.show(
            share, count=f"{self._count}/{self._total}", left=left, error=error, name=name
        )


class _Left(ProgressColumn):
    """Time left, which goes on running down between steps."""

    def render(self, task: Any) -> Text:
        ends = task.fields["ends"]
        if ends is None:
            return Text("–:–– left")
        return Text(f"{_clock(max(0.0, ends - time.perf_counter()))} left")


def _clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours if there are any."""
    return str(datetime.timedelta(seconds=round(seconds))).removeprefix("0:")


class _Name(ProgressColumn):
    """Name, of which a narrow terminal shows the end."""

    def render(self, task: Any) -> Text:
        name, most = printable(task.fields["name"]), max(8, task.fields["width"])
        return Text(end_of(name, most), no_wrap=True)


class _Shown:
    """The bar itself, in a terminal or a notebook."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        in_notebook = console.is_jupyter
        self._bar = Progress(
            BarColumn(bar_width=24), TextColumn("{task.fields[count]}", markup=False), _Left(),
            TextColumn("{task.fields[error]}", markup=False), _Name(),
            console=console, transient=True, disable=in_notebook or not console.is_terminal,
            redirect_stdout=Console().is_terminal,  # else it would end in the terminal
        )  # fmt: skip
        self._width = (100 if in_notebook else console.width) - 57
        self._task: Any = None
        self._display: Any = _notebook_display if in_notebook else None

    def show(self, share: float | None, *, left: float | None, **fields: Any) -> None:
        ends = None if left is None else time.perf_counter() + left
        fields |= {"ends": ends, "width": self._width}
        total = None if share is None else 1.0
        if self._task is None:
            self._task = self._bar.add_task("", total=total, **fields)
        with _LOST:
            self._bar.start()  # unless it is there
        self._bar.update(self._task, total=total, completed=share or 0.0, **fields)
        if self._display is not None:
            self._display = self._display(self._bar)

    def close(self) -> None:
        with _LOST:
            self._bar.stop()


def _notebook_display(bar: Progress) -> Callable[[Progress], Any]:
    """Show the bar below the cell, and return what shows it there again."""
    from IPython.display import display

    handle = display(bar.make_tasks_table(bar.tasks), display_id=True)

    def again(bar: Progress) -> Callable[[Progress], Any]:
        handle.update(bar.make_tasks_table(bar.tasks))
        return again

    return again
