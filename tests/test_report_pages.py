"""Pages of reports: names that are no markup, the worst first, nothing from elsewhere."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from matfact._depth_chart import depth_chart
from matfact._html import scaled
from matfact.compare import Comparison, ComparisonRow, compare_projections
from matfact.report import CompressionReport, LayerReport

EVIL = "<script>alert('x')</script>\"&\u202e"


def layer(name, error, **changes):
    fields = {
        "layer": name, "kind": "Linear", "rows": 8, "columns": 8, "groups": 1, "method": "DSF",
        "status": "compressed", "dense_nbytes": 256, "dense_flops": 128, "density": 0.25,
        "relative_error": error, "normalized_error": 0.9, "nbytes": 64, "bits_per_weight": 8.0,
        "flops": 32, "seconds": 1.5,
    }  # fmt: skip
    return LayerReport(**fields | changes)


def kept(name):
    return LayerReport(name, "Linear", 8, 8, 1, "", "kept", 256, 128, message=EVIL)


def written(report, tmp_path):
    report.to_html(tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def shown(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", page.split("</style>")[1]))


class Tags(HTMLParser):
    """The tags of a page, which must be closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


REPORTS = {
    "compressed": CompressionReport(
        [layer(EVIL, 0.1), layer("blocks.0.up", 0.3), layer("blocks.1.up", 0.2), kept("head")],
        {EVIL: EVIL, "steps": [EVIL], "untouched": {EVIL: 0.1}, "budget": {"cost": EVIL}},
    ),
    "compared": Comparison(
        [ComparisonRow(EVIL, 4, 4, EVIL, EVIL, 0.1, "failed", message=EVIL)], {EVIL: {EVIL: [EVIL]}}
    ),
    "empty": CompressionReport([]),
}


@pytest.mark.parametrize("name", REPORTS)
def test_names_and_settings_are_no_markup_and_nothing_comes_from_elsewhere(name, tmp_path):
    page = written(REPORTS[name], tmp_path)
    tags = Tags(page)
    assert tags.open == []
    assert "script" not in {tag for tag, _ in tags.seen}
    assert not [v for _, held in tags.seen for k, v in held.items() if k in {"href", "onload"}]
    assert all(held["src"].startswith("data:") for tag, held in tags.seen if tag == "img")
    assert any("default-src 'none'" in str(held.get("content")) for _, held in tags.seen)
    assert "\u202e" not in page
    assert ("alert('x')" in shown(page)) == (name != "empty")


@pytest.mark.parametrize("name", REPORTS)
def test_pages_suit_phones_and_dark_screens_and_explain_their_columns(name, tmp_path):
    page = written(REPORTS[name], tmp_path)
    tags = Tags(page).seen
    assert "prefers-color-scheme: dark" in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    n_tables = page.count("<table>")
    assert len(re.findall(r'<div class="scroll"[^>]*><table>', page)) == n_tables > 0
    headings = re.findall(r"<th(?: [^>]*)?>(.*?)</th>", page)
    assert all(re.fullmatch(r'<abbr title="[^"]+">[^<]+</abbr>', text) for text in headings)


def test_totals_come_first_and_then_layers_by_harm(tmp_path):
    text = shown(written(REPORTS["compressed"], tmp_path))
    assert "448 B" in text
    assert "43.8% of 1.02 kB" in text
    assert text.index("bits a weight") < text.index("Errors over depth") < text.index("by harm")
    table = text[text.index("by harm") :]
    places = [table.index(name) for name in ("blocks.0.up", "blocks.1.up", "alert", "head")]
    assert places == sorted(places)
    assert "output error" not in text  # nothing was calibrated
    assert "predicted speed" not in text


def test_speed_is_predicted_from_measured_times_alone(tmp_path):
    budget = {"cost": "seconds", "ceiling": 0.5, "planned": 0.4, "dense": 1.0}
    text = shown(written(CompressionReport([layer("a", 0.1)], {"budget": budget}), tmp_path))
    assert re.search(r"predicted speed\s+× 2\.50", text)


def test_errors_are_drawn_in_the_order_of_the_network_a_series_for_layers_of_a_name():
    points = [(f"h.{i}.{n}", 0.1 * (i + 1)) for i in range(3) for n in ("up", "down")]
    chart = depth_chart([*points, ("head", None), ("odd", float("inf"))], "error")
    lines = re.findall(r'points="([^"]+)"', chart)
    assert len(lines) == 2
    across, down = np.array([[p.split(",") for p in line.split()] for line in lines], float).T
    assert (np.diff(across, axis=0) > 0).all()
    assert (np.diff(down, axis=0) < 0).all()  # up the picture
    assert chart.count("<title>") == 6
    assert "up</li>" in chart
    assert depth_chart([("a", 0.0), ("b", 0.0)], "error").count("<title>") == 2
    assert depth_chart([("a", 0.1), ("b", None)], "error") == ""


def test_many_names_are_one_series():
    chart = depth_chart([(f"h.{i}.{n}", 0.1) for i in range(2) for n in range(9)], "error")
    assert chart.count("<polyline") == 1


def test_the_best_of_each_size_is_bold(tmp_path):
    W = {f"{n}": np.random.RandomState(0).randn(n, n) for n in (8, 16)}
    study = compare_projections(W, ["lowrank", "magnitude"])
    page = written(study, tmp_path)
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["size 8, density 0.25", "size 16, density 0.25"]
    for name in ("8", "16"):
        best = min(row.relative_error for row in study if row.size == name)
        assert f"<b>{best:.3f}" in page
    worst = max(row.relative_error for row in study)
    assert f"<b>{worst:.3f}" not in page


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (123456, "123 k"), (4e13, "40.0 T")],
)
def test_numbers_have_three_digits(number, text):
    assert scaled(number) == text
