import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import rich.console

from matfact.compare import Comparison, ComparisonRow, summary_table


def row(matrix="a", method="lowrank", size=8, error=0.5, **changes):
    fields = {
        "matrix": matrix, "rows": size, "columns": size, "size": str(size), "method": method,
        "requested_density": 0.25, "status": "ok", "density": 0.24, "nnz": 15,
        "relative_error": error / 2, "normalized_error": error, "seconds": 0.1, "n_iter": 1,
        "flops_ratio": 0.24, "nbytes": 60, "bits_per_weight": 7.5,
    }  # fmt: skip
    return ComparisonRow(**fields | changes)


FAILED = ComparisonRow("c", 8, 8, "8", "dsf", 0.25, "failed", message='why, "so"\nit is')
TABLE = Comparison(
    [row("a", error=0.5), row("b", error=0.7), row("d", size=16, error=1 / 3), FAILED],
    {"random_state": 3, "versions": {"numpy": "2"}, "label": "Größe 8×8"},
)


def test_json_round_trip_is_exact(tmp_path):
    TABLE.to_json(tmp_path / "t.json")
    again = Comparison.from_json(tmp_path / "t.json")
    assert list(again) == list(TABLE)
    assert again.metadata == TABLE.metadata


def test_json_is_standard_even_for_infinite_errors(tmp_path):
    Comparison([row(error=math.inf), row(error=math.nan)]).to_json(tmp_path / "t.json")

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "t.json").read_text(), parse_constant=refuse)
    assert [r["normalized_error"] for r in content["rows"]] == [None, None]


def test_csv_holds_every_value(tmp_path):
    TABLE.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [
        {name: "" if value is None else str(value) for name, value in dataclasses.asdict(r).items()}
        for r in TABLE
    ]
    assert lines == expected


def test_pandas_frame_has_a_row_for_each_fit():
    pytest.importorskip("pandas")
    frame = TABLE.to_pandas()
    assert list(frame["matrix"]) == ["a", "b", "d", "c"]
    assert frame["normalized_error"].isna().tolist() == [False, False, False, True]
    assert frame.attrs["random_state"] == 3


def test_summary_is_mean_and_sample_deviation_by_size_and_method():
    groups = {(g.size, g.method): g for g in TABLE.summary()}
    assert list(groups) == [("8", "lowrank"), ("8", "dsf"), ("16", "lowrank")]
    pair, failed, single = groups.values()
    assert pair.mean["normalized_error"] == pytest.approx(0.6)
    assert pair.std["normalized_error"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert (failed.n_ok, failed.n_failed, failed.mean) == (0, 1, {})
    assert single.std["normalized_error"] == 0.0


def test_sizes_are_ordered_as_numbers():
    sizes = [1024, 64, 256]
    assert [g.size for g in Comparison([row(size=n) for n in sizes]).summary()] == [
        "64", "256", "1024",
    ]  # fmt: skip


def rendered(comparison):
    console = rich.console.Console(width=80, file=io.StringIO())
    console.print(summary_table(comparison))
    return console.file.getvalue()


def test_printed_table_shows_means_spreads_and_failures():
    text = rendered(TABLE)
    assert "0.600 ± 0.141" in text
    assert "0.333" in text
    assert "7.50" in text
    assert "failed" in text


def test_printed_table_fits_eighty_columns():
    shape = {"rows": 1536, "columns": 384, "size": "1536×384"}
    wide = [
        dataclasses.replace(
            row(method="butterfly", error=error),
            **shape,
            requested_density=asked,
            bits_per_weight=17.5,
        )
        for error in (1.111, 1.555)
        for asked in (0.25, 0.5)
    ]
    assert "…" not in rendered(Comparison(wide))


def test_an_empty_comparison_is_a_table_too(tmp_path):
    empty = Comparison([])
    empty.to_json(tmp_path / "t.json")
    assert len(Comparison.from_json(tmp_path / "t.json")) == 0
    assert empty.summary() == []
    assert rendered(empty)


def test_a_measure_that_a_file_lacks_is_unknown_in_the_means(tmp_path):
    old = dataclasses.asdict(row())
    del old["bits_per_weight"]
    (tmp_path / "t.json").write_text(json.dumps({"rows": [old], "metadata": {}}))
    (group,) = Comparison.from_json(tmp_path / "t.json").summary()
    assert math.isnan(group.mean["bits_per_weight"])
    assert group.mean["nnz"] == 15
