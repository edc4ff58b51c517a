"""The tables of the pages are those of their data files."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import pages, summary

ROOT = Path(__file__).parents[2]
MEASURED = [
    p for kind in ("benchmark-", "study-", "scaling") for p in (ROOT / "docs").glob(f"{kind}*.md")
]
ROWS = [
    {"method": "DSF", "bits": 2.5, "error": 0.24021, "seconds": 14.8},
    {"method": "DSF", "bits": 4, "error": 0.1},
    {"method": "RTN", "bits": 2.5, "error": 0.31},
]
PAGE = (
    "Text.\n\n<!-- table errors from data/bits.json -->\n\nold\n\n<!-- end of table -->\n\nMore.\n"
)


def write(root, page=PAGE, **table):
    """Write a page and a data file with one table."""
    (root / "docs" / "data").mkdir(parents=True)
    (root / "docs" / "bits.md").write_text(page)
    (root / "README.md").write_text("No table.\n")
    content = {
        "sets": {"all": {"measured": {}, "rows": ROWS}},
        "tables": {"errors": {"set": "all", **table}},
    }
    pages.save(root / "docs" / "data" / "bits.json", content)
    assert json.loads((root / "docs" / "data" / "bits.json").read_text()) == content


def test_the_pages_show_the_numbers_of_their_data_files():
    assert [str(path) for path in pages.update(ROOT, write=False)] == []


def tables_outside(text):
    """Return the first line of each table with numbers that is not from a data file."""
    text = re.sub(r"<!-- table .*?<!-- end of table -->", "", text, flags=re.DOTALL)
    tables = re.findall(r"(?:^ *\|.*\n)+", text, re.MULTILINE)
    return [table.splitlines()[0] for table in tables if re.search(r"\d", table)]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_measured_tables_come_from_data_files(path):
    assert tables_outside(path.read_text()) == []


def test_a_table_outside_is_found():
    assert tables_outside(PAGE + "\n| a | b |\n|---|---|\n| 1.2 | x |\n") == ["| a | b |"]


def test_a_table_shows_selected_rows_and_columns(tmp_path):
    columns = {"how": "{method}", "error": ["{error:.3f}", " ({seconds * 1e3:.0f} ms)"]}
    write(tmp_path, columns=columns, where={"bits": 2.5})
    assert list(pages.update(tmp_path, write=False)) == [tmp_path / "docs" / "bits.md"]
    assert "old" in (tmp_path / "docs" / "bits.md").read_text()
    assert list(pages.update(tmp_path, write=True)) == [tmp_path / "docs" / "bits.md"]
    assert list(pages.update(tmp_path, write=False)) == []
    assert (tmp_path / "docs" / "bits.md").read_text() == PAGE.replace(
        "old", "| how | error |\n|---|---|\n| DSF | 0.240 (14800 ms) |\n| RTN | 0.310 |"
    )


def test_rows_stand_side_by_side(tmp_path):
    at = {
        f"at {bits:g} bits": {"cell": "{error:.2f}", "where": {"bits": bits}} for bits in (2.5, 4)
    }
    write(tmp_path, columns={"": "{method}", **at}, line=["method"])
    list(pages.update(tmp_path, write=True))
    text = (tmp_path / "docs" / "bits.md").read_text()
    assert "| DSF | 0.24 | 0.10 |\n| RTN | 0.31 | – |\n" in text


def test_a_table_keeps_the_indentation_of_its_marker(tmp_path):
    page = "??? note\n    <!-- table errors from data/bits.json -->\n    <!-- end of table -->\n"
    write(tmp_path, page, columns={"how": "{method}"})
    list(pages.update(tmp_path, write=True))
    assert "\n    | how |\n    |---|\n    | DSF |\n" in (tmp_path / "docs" / "bits.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("table errors", "table speeds", r"docs/bits\.md: no table 'speeds' .* it has errors"),
        ("bits.json", "bytes.json", r"docs/bits\.md: there is no docs/data/bytes\.json"),
        ("<!-- end of table -->", "", "docs/bits.md: no '<!-- end of table -->' follows"),
    ],
)
def test_a_marker_of_what_is_not_there_is_an_error(tmp_path, old, new, message):
    write(tmp_path, PAGE.replace(old, new), columns={"how": "{method}"})
    with pytest.raises(pages.PageError, match=message):
        list(pages.update(tmp_path, write=True))


def test_rows_of_a_benchmark_replace_those_of_a_set(tmp_path, monkeypatch):
    write(tmp_path, columns={"how": "{method}", "error": "{error:.2f} ± {error ±:.2f}"})
    cell = {"method": "GPTQ", "bits": 2.5}
    spread = {"mean": 0.2, "deviation": 0.01, "count": 3}
    content = {"conditions": {"cpu": "x"}, "rows": [{"cell": cell, "results": {"error": spread}}]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    options = argparse.Namespace(check=False, take=tmp_path / "results.json", into="bits:all")
    assert pages.run(options) == 0
    assert "| GPTQ | 0.20 ± 0.01 |" in (tmp_path / "docs" / "bits.md").read_text()
    measured = json.loads((tmp_path / "docs" / "data" / "bits.json").read_text())["sets"]["all"]
    assert measured["measured"] == {"conditions": {"cpu": "x"}}


def test_the_summary_takes_figures_from_the_other_files(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(ROOT / "docs" / "data", data)
    content = pages.read(data / "bits.json")
    (row,) = (
        row
        for row in content["sets"]["networks"]["rows"]
        if (row["network"], row["bits"], row["method"]) == ("sentence encoder", 4.0, "DSF")
    )
    row |= {"1 − cosine": 0.25, "stored": 8, "seconds": 600}
    pages.save(data / "bits.json", content)
    form = "DSF, 8.0 bits a weight"
    rows = summary.networks(data)["sets"]["networks"]["rows"]
    (found,) = (row for row in rows if row["form"] == form)
    assert (found["cosine"], found["bytes"], found["minutes"]) == (0.75, 0.25, 10)
    (other,) = (
        r for r in rows if r["form"] == "DSF, 25 %, bfloat16" and r["network"] == found["network"]
    )
    assert "cosine" not in other  # not measured
    content["sets"]["networks"]["rows"].remove(row)
    pages.save(data / "bits.json", content)
    with pytest.raises(pages.PageError, match=r"bits\.json: 0 rows of 'networks' fit"):
        summary.networks(data)


def test_take_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    write(tmp_path, columns={})
    (tmp_path / "results.json").write_text("{}")
    for file, into in (("results", "bits:all"), ("absent", "bits:all"), ("results", None)):
        options = argparse.Namespace(check=True, take=tmp_path / f"{file}.json", into=into)
        with pytest.raises(SystemExit, match="--take"):
            pages.run(options)
