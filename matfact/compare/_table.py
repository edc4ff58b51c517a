"""Table of a comparison, with one row per fit."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matfact._files import write_atomically
from matfact._json import finite, read_report
from matfact._tables import data_frame
from matfact._text import csv_text
from matfact.compare._html import page
from matfact.compare._rows import COLUMNS, MEASURES, ComparisonRow, SummaryRow


class Comparison(Sequence[ComparisonRow]):
    """A tidy table of fits.

    Parameters
    ----------
    rows : sequence of ComparisonRow
        One per fit.
    metadata : mapping of str to object, optional
        Seed, versions, machine and other conditions.
    """

    def __init__(
        self, rows: Sequence[ComparisonRow], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.rows = tuple(rows)
        self.metadata = dict(metadata or {})

    def summary(self) -> list[SummaryRow]:
        """Return mean and spread for each density, size (ascending) and method."""
        methods = {name: i for i, name in enumerate(dict.fromkeys(row.method for row in self))}
        groups: dict[tuple[Any, ...], list[ComparisonRow]] = {}
        for row in self:
            size = (row.rows * row.columns, row.size)
            asked = row.requested_bits or 0.0, row.requested_density or 0.0
            key = (*asked, size, methods[row.method])
            groups.setdefault(key, []).append(row)
        return [_summarize(groups[key]) for key in sorted(groups)]

    def to_csv(self, path: str | Path) -> None:
        """Write the rows to a CSV file. Missing values are blank."""
        write_atomically(path, csv_text(COLUMNS, map(dataclasses.astuple, self.rows)).encode())

    def to_json(self, path: str | Path) -> None:
        """Write metadata, rows and summary to a JSON file, with null for non-finite values."""
        content = {
            "metadata": self.metadata,
            "rows": [dataclasses.asdict(row) for row in self],
            "summary": [dataclasses.asdict(group) for group in self.summary()],
        }
        text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(path, text.encode())

    def to_html(self, path: str | Path) -> None:
        """Write an HTML page with the figure, the means and every fit: one file, no scripts."""
        content = page(self.rows, self.summary(), self.metadata)
        write_atomically(path, content.encode())

    @classmethod
    def from_json(cls, path: str | Path) -> Comparison:
        """Read a comparison written by `to_json`. Raise ``ValueError`` if it is invalid."""
        return cls(*read_report(path, ComparisonRow))

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame, with the metadata in ``attrs``."""
        return data_frame(self.rows, ComparisonRow, self.metadata)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ComparisonRow]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __repr__(self) -> str:
        failed = sum(row.status != "ok" for row in self)
        methods = ", ".join(dict.fromkeys(row.method for row in self))
        return f"Comparison({len(self)} fits, {failed} failed: {methods})"


def _summarize(rows: Sequence[ComparisonRow]) -> SummaryRow:
    ok = [row for row in rows if row.status == "ok"]
    values = {name: [_number(getattr(row, name)) for row in ok] for name in MEASURES} if ok else {}
    return SummaryRow(
        method=rows[0].method,
        size=rows[0].size,
        requested_density=rows[0].requested_density,
        n_ok=len(ok),
        n_failed=len(rows) - len(ok),
        mean={name: statistics.fmean(column) for name, column in values.items()},
        std={name: _spread(column) for name, column in values.items()},
        requested_bits=rows[0].requested_bits,
    )


def _number(measure: float | None) -> float:
    """Return a measure, NaN where a file of an earlier version, or of one not finite, has none."""
    return math.nan if measure is None else measure


def _spread(values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0
