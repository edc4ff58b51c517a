"""Report of a compression, layer by layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matfact._files import write_atomically
from matfact._json import finite, read_report, report_rows
from matfact._layers import IN_NO_LAYER, LayerReport
from matfact._report_page import page
from matfact._tables import FittedTable, Heading, data_frame
from matfact._text import csv_text

COLUMNS = tuple(field.name for field in dataclasses.fields(LayerReport))
_HEADINGS = (
    Heading("layer", is_number=False),
    Heading("method", 4, is_number=False, is_prose=True),
    Heading("shape", 5),
    Heading("density", 6),
    Heading("relative", 1),
    Heading("normalized", 7),
    Heading("outputs", 2),
    Heading("bits", 3),
    Heading("bytes"),
    Heading("s", 8),
)


class CompressionReport(Sequence[LayerReport]):
    """The layers of a compressed network.

    Parameters
    ----------
    rows : iterable of LayerReport
        One per layer considered, in the order of the network.
    metadata : mapping of str to object, optional
        What was requested, and other things that were done.
    """

    def __init__(
        self, rows: Iterable[LayerReport], metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.rows = tuple(rows)
        self.metadata = dict(metadata or {})

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of all layers, dense ones for layers kept or only planned."""
        return sum(row.dense_nbytes if row.nbytes is None else row.nbytes for row in self.rows)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same weights before compression."""
        return sum(row.dense_nbytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all weights ÷ their entries, including kept layers."""
        entries = sum(row.entries for row in self.rows)
        return 8 * self.nbytes / entries if entries else 0.0

    @property
    def density(self) -> float:
        """Stored values ÷ entries of all weights, including kept layers."""
        entries = [row.entries for row in self.rows]
        stored = [
            n * (1.0 if row.density is None else row.density)
            for n, row in zip(entries, self.rows, strict=True)
        ]
        return sum(stored) / sum(entries) if entries else 1.0

    @property
    def seconds(self) -> float:
        """Sum of the wall times of all fits, which may have run in parallel."""
        return sum(row.seconds or 0.0 for row in self.rows)

    def check_fits(self, names: Iterable[str]) -> None:
        """Raise ``ValueError`` if a compressed layer is none of the modules `names` of a network.

        Wrappers of a network, such as those of torch.compile, add to the front of names.
        """
        held = {""}
        for name in names:
            parts = name.split(".")
            held.update(".".join(parts[i:]) for i in range(len(parts)))
        for row in self.rows:
            if row.status == "compressed" and row.layer not in held:
                raise ValueError(
                    "report must be of this network, but it names a compressed layer "
                    f"{row.layer!r}, which the network has not."
                )

    def table(self) -> FittedTable:
        """Return a table to print with ``rich.print``.

        Where the terminal is narrow, columns are left out, and then the beginnings of names.
        """
        ratio = self.nbytes / self.dense_nbytes if self.dense_nbytes else 1.0
        total = [
            f"{len(self.rows)} layers", "", "", f"{self.density:.3f}", "", "", "",
            f"{self.bits_per_weight:.2f}", f"{ratio:.1%}", f"{self.seconds:.1f}",
        ]  # fmt: skip
        rows = [[row.layer, row.outcome, *_cells(row)] for row in self.rows]
        return FittedTable(_HEADINGS, [rows, [total]], "; ".join(self._remarks()) or None)

    def to_markdown(self) -> str:
        """Return the table in Markdown, for a model card or an issue."""
        return self.table().to_markdown()

    def to_pandas(self) -> Any:
        """Return the layers as a pandas DataFrame, with the metadata in ``attrs``.

        Integers stay integers: what is missing in layers that were kept is ``pandas.NA``. Missing
        errors are NaN.
        """
        return data_frame(self.rows, LayerReport, self.metadata)

    def _remarks(self) -> list[str]:
        """Return notes on other changes, and on matrices that are in no layer of the report."""
        return [*self.metadata.get("steps", ()), *self.untouched()]

    def untouched(self, most: int = 3) -> list[str]:
        """Return a sentence on the matrices that are in no layer, if any, with their shares.

        Parameters
        ----------
        most : int, default=3
            How many of them to name, largest first.
        """
        shares = dict(self.metadata.get("untouched", {}))
        if not shares:
            return []
        names = [f"{n} ({s:.1%})" for n, s in sorted(shares.items(), key=lambda i: -i[1])[:most]]
        names += ["…"] if len(shares) > most else []
        share = f"{sum(shares.values()):.1%} of all parameters"
        return [f"{IN_NO_LAYER}, {share}: {', '.join(names)}"]

    def to_csv(self, path: str | Path) -> None:
        """Write the rows to a CSV file. Missing values are blank."""
        write_atomically(path, csv_text(COLUMNS, map(dataclasses.astuple, self.rows)).encode())

    def content(self) -> dict[str, Any]:
        """Return metadata and rows for JSON, with None for values that are not finite."""
        rows = [finite(dataclasses.asdict(row)) for row in self.rows]
        return {"metadata": self.metadata, "rows": rows}

    @classmethod
    def from_content(cls, content: Any) -> CompressionReport:
        """Rebuild a report from its `content`. Raise ``ValueError`` if it is invalid."""
        return cls(*report_rows(content, LayerReport))

    def to_json(self, path: str | Path) -> None:
        """Write metadata and rows to a JSON file, with null for values that are not finite."""
        text = json.dumps(self.content(), indent=1, allow_nan=False)
        write_atomically(path, text.encode())

    @classmethod
    def from_json(cls, path: str | Path) -> CompressionReport:
        """Read a report written by `to_json`. Raise ``ValueError`` if it is invalid."""
        return cls(*read_report(path, LayerReport))

    def to_html(self, path: str | Path) -> None:
        """Write an HTML page: totals, errors over depth, layers by harm. One file, no scripts."""
        untouched = "; ".join(self.untouched(most=20))
        write_atomically(path, page(self.rows, self.metadata, untouched).encode())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __repr__(self) -> str:
        done = sum(row.status == "compressed" for row in self.rows)
        planned = sum(row.status == "planned" for row in self.rows)
        if planned:
            return (
                f"CompressionReport({planned} of {len(self.rows)} layers to compress, "
                f"{self.dense_nbytes} bytes before)"
            )
        return (
            f"CompressionReport({done} of {len(self.rows)} layers compressed, "
            f"density {self.density:.3f}, {self.nbytes} of {self.dense_nbytes} bytes)"
        )


def _cells(row: LayerReport) -> list[str]:
    """Return the measures of a row as text, blank if missing."""
    shape = f"{row.rows}×{row.columns}" + (f"×{row.groups}" if row.groups > 1 else "")
    ratio = "" if row.nbytes is None else f"{row.nbytes / row.dense_nbytes:.1%}"
    errors = (row.density, row.relative_error, row.normalized_error, row.layer_error)
    return [
        shape,
        *("" if value is None else f"{value:.3f}" for value in errors),
        "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
        ratio,
        "" if row.seconds is None else f"{row.seconds:.2f}",
    ]
