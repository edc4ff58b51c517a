"""Tables of reports keep names whole, in terminals of any width and in Markdown."""

import io
import sys

import pytest
from rich.console import Console

from matfact._tables import FittedTable, Heading, end_of
from matfact.compare import Comparison, ComparisonRow, summary_table
from matfact.report import CompressionReport, LayerReport

NAMES = [
    f"model.decoder.layers.{i}.{part}" for i in (0, 11) for part in ("self_attn.q_proj", "mlp.up")
]
MEASURES = {
    "requested_density": 0.25, "density": 0.25, "relative_error": 0.31, "normalized_error": 0.8,
    "layer_error": 0.11, "fitted_layer_error": 0.1, "nbytes": 12345, "bits_per_weight": 3.2,
    "flops": 4321, "seconds": 12.3,
}  # fmt: skip
METHOD = "Quantized(DoubleSparseFactorizer)"
REPORT = CompressionReport(
    [
        *(LayerReport(n, "Linear", 64, 64, 1, METHOD, "compressed", 16384, 8192, **MEASURES)
          for n in NAMES),
        LayerReport("[red]head|_", "Linear", 64, 64, 1, "", "kept", 16384, 8192, message="tied"),
    ],
    {"method": "dsf"},
)  # fmt: skip


def printed(table, width):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "columns"), [(60, 2), (80, 4), (120, 7), (200, 10)])
def test_narrow_terminals_get_fewer_columns_and_whole_names(width, columns):
    lines = printed(REPORT.table(), width)
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[2:7]] == [*NAMES, "[red]head|_"]
    assert len(lines[0].split()) >= columns
    told = " ".join(lines)
    assert all(heading.text in told for heading in REPORT.table().headings)


def test_ends_tell_names_apart_where_not_even_names_fit():
    names = [line.split()[0] for line in printed(REPORT.table(), 34)[2:6]]
    assert len(set(names)) == 4
    assert all(name.startswith("…") or name in NAMES for name in names)
    assert all(full.endswith(name.strip("…")) for full, name in zip(NAMES, names, strict=True))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_of_comparisons_fit_and_keep_methods_and_errors(width):
    row = ComparisonRow(
        "w", 4096, 11008, "4096×11008", "kaleidoscope", 0.25, "ok", 0.24, 15, 0.25, 0.5, 0.1, 1,
        0.24, 60, bits_per_weight=7.5,
    )  # fmt: skip
    failed = ComparisonRow("w", 8, 8, "8", "dsf", 0.25, "failed")
    lines = printed(summary_table(Comparison([row, row, failed])), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(each in text for each in ("4096×11008", "kaleidoscope", "0.250 ± 0.000", "failed"))


def test_markdown_has_all_columns_and_names_that_mean_nothing_to_it():
    head, rule, *rows = REPORT.to_markdown().splitlines()
    assert [line.count("|") - line.count("\\|") for line in (head, rule, *rows)] == [11] * 8
    assert rows[0].startswith(f"| {NAMES[0]} | {METHOD} | 64×64 | 0.250 |")
    assert rows[4].startswith(r"| \[red\]head\|\_ | kept: tied |")
    table = FittedTable([Heading("a\nb", is_number=False)], [[["<b>_x_ `y` a_b"]]])
    assert table.to_markdown() == "| a b |\n| :--- |\n| &lt;b>\\_x\\_ \\`y\\` a_b |\n"


def test_ends_have_the_length_asked_for():
    assert [end_of("abcdef", n) for n in (7, 6, 5)] == ["abcdef", "abcdef", "…cdef"]


def test_a_frame_has_a_layer_in_each_row_and_the_types_of_the_fields():
    pandas = pytest.importorskip("pandas")
    frame = REPORT.to_pandas()
    assert list(frame.layer) == [*NAMES, "[red]head|_"]
    assert frame.nbytes.sum() == 4 * 12345
    assert frame.nbytes.dtype == "Int64"
    assert frame.nbytes.iloc[-1] is pandas.NA
    assert (frame.rows.dtype, frame.relative_error.dtype) == ("int64", "float64")
    assert frame.relative_error.isna().tolist() == [False] * 4 + [True]
    assert frame.attrs == {"method": "dsf"}
    assert CompressionReport([]).to_pandas().dtypes.equals(frame.dtypes)


@pytest.mark.parametrize("report", [REPORT, Comparison([])])
def test_a_missing_pandas_is_named(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        report.to_pandas()
