"""Tables of reports: for terminals of any width, for Markdown and for pandas."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from matfact._text import printable

#: Kinds of columns of pandas by annotations of fields. Missing integers stay apart from 0.
_DTYPES = {"int": "int64", "int | None": "Int64", "float": "float64", "float | None": "float64",
           "str": "str"}  # fmt: skip
#: Columns that prose gets at least.
_PROSE = 16
#: What Markdown reads; an underscore within a word is none.
_MEANING = re.compile(r"[\\`*\[\]|#~]|(?<![^\W_])_|_(?![^\W_])")


class Heading(NamedTuple):
    """A column of a table.

    Attributes
    ----------
    text : str
        Its heading.
    drop : int
        Where a terminal is narrow, columns of low numbers come first and others are left out. 0
        stays.
    is_number : bool
        Whether it is aligned to the right.
    is_prose : bool
        Whether it may wrap between words.
    """

    text: str
    drop: int = 0
    is_number: bool = True
    is_prose: bool = False


class FittedTable(Table):
    """Table that never breaks a name: narrow terminals get fewer columns, and then ends of names.

    Parameters
    ----------
    headings : sequence of Heading
        The columns; names are in the first one that is no number.
    sections : sequence of sequence of rows
        Rows of cells, text or ``rich.text.Text``, in sections that lines separate.
    caption : str, optional
        Text below.
    is_dense : bool, default=False
        Whether one space between columns has to do.
    """

    def __init__(
        self,
        headings: Sequence[Heading],
        sections: Sequence[Sequence[Sequence[str | Text]]],
        caption: str | None = None,
        *,
        is_dense: bool = False,
    ) -> None:
        super().__init__(
            box=rich.box.SIMPLE_HEAD, padding=(0, 0 if is_dense else 1, 0, 0), show_edge=False,
            caption=None if caption is None else Text(printable(caption), style="table.caption"),
            caption_justify="left",
        )  # fmt: skip
        self.headings, self.sections = tuple(headings), sections
        for heading in headings:
            justify: Any = "right" if heading.is_number else "left"
            self.add_column(heading.text, justify=justify, no_wrap=not heading.is_prose)
        for section in sections:
            for row in section:
                self.add_row(*map(_cell, row))
            self.add_section()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render what fits."""
        fitted = self.fitted(options.max_width)
        yield from Table.__rich_console__(fitted, console, options)

    def fitted(self, width: int) -> FittedTable:
        """Return the table with the columns that fit, the first ones first, and ends of names."""
        needed = {heading: self._needed(i) for i, heading in enumerate(self.headings)}

        def excess(kept: Collection[Heading], gap: int = 1) -> int:
            return sum(needed[heading] + gap for heading in kept) - 1 - width

        if excess(self.headings, gap=2) <= 0:
            return self
        kept = {heading for heading in self.headings if not heading.drop}
        for heading in sorted(set(self.headings) - kept, key=lambda heading: heading.drop):
            if excess(kept | {heading}) <= 0:
                kept.add(heading)
        return self._with(kept, max(0, excess(kept)))

    def _needed(self, place: int) -> int:
        """Return the width that a column needs; prose wraps between words."""
        heading = self.headings[place]
        cells = [*heading.text.split("\n"), *(_cell(row[place]).plain for row in self._rows())]
        widest = max(map(cell_len, cells))
        if not heading.is_prose:
            return widest
        words = (cell_len(word) for cell in cells for word in cell.split())
        return min(widest, max(_PROSE, *words))

    def _with(self, kept: Collection[Heading], excess: int) -> FittedTable:
        """Return the table with some columns, and names that are shorter by `excess`."""
        places = [i for i, heading in enumerate(self.headings) if heading in kept]
        named = next((i for i in places if not self.headings[i].is_number), places[0])
        most = max(8, self._needed(named) - excess)

        def shown(row: Sequence[str | Text], place: int) -> str | Text:
            cell = _cell(row[place])
            return end_of(cell.plain, most) if place == named and len(cell) > most else cell

        sections = [[[shown(row, i) for i in places] for row in rows] for rows in self.sections]
        left_out = [" ".join(each.text.split()) for each in self.headings if each not in kept]
        told = [str(self.caption)] if self.caption else []
        told += [f"too narrow for: {', '.join(left_out)}"] if left_out else []
        headings = [self.headings[i] for i in places]
        return FittedTable(headings, sections, "; ".join(told) or None, is_dense=True)

    def _rows(self) -> Iterator[Sequence[str | Text]]:
        return (row for rows in self.sections for row in rows)

    def to_markdown(self) -> str:
        """Return the table in Markdown, with all columns."""
        lines = [
            [" ".join(heading.text.split()) for heading in self.headings],
            ["---:" if heading.is_number else ":---" for heading in self.headings],
            *(list(map(_in_markdown, row)) for row in self._rows()),
        ]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def end_of(name: str, most: int) -> str:
    """Return a name, or its last characters, of at most `most` in all."""
    return name if len(name) <= most else f"…{name[len(name) - most + 1 :]}"


def _cell(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))  # names are no markup


def _in_markdown(cell: str | Text) -> str:
    """Return a cell whose characters mean nothing to Markdown."""
    shown = printable(cell).replace("&", "&amp;").replace("<", "&lt;")
    return _MEANING.sub(r"\\\g<0>", shown)


def data_frame(rows: Iterable[Any], row_type: type, metadata: Mapping[str, Any]) -> Any:
    """Return rows, which are dataclasses, as a pandas DataFrame with the metadata in ``attrs``."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas, or use to_csv.") from error
    fields = dataclasses.fields(row_type)
    values = [[getattr(row, field.name) for field in fields] for row in rows]
    frame = pd.DataFrame(values, columns=[field.name for field in fields], dtype=object)
    frame = frame.astype({field.name: _DTYPES[str(field.type)] for field in fields})
    frame.attrs.update(metadata)
    return frame
