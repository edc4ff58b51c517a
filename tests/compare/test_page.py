"""A comparison's page shows everything and needs no other file."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from matfact import compare_projections
from matfact.compare import Comparison, ComparisonRow

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    table = compare_projections(
        {"<i>noise</i>": np.random.RandomState(0).randn(16, 16)}, ["lowrank", "magnitude"]
    )
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    table.to_html(path)
    return path


def test_a_page_needs_nothing_from_elsewhere(page):
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "data:image/png;base64," in html


def test_every_fit_has_a_row_and_names_are_no_markup(page):
    html = page.read_text(encoding="utf-8")
    assert html.count("&lt;i&gt;noise&lt;/i&gt;") == 2
    assert "<i>" not in html


def test_failed_fits_are_shown_with_their_reason(tmp_path):
    row = ComparisonRow("w", 4, 4, "4", "dsf", 0.1, "failed", message="density is too small")
    Comparison([row]).to_html(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "1 fits, 1 failed" in html
    assert "density is too small" in html


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_a_browser_shows_the_figure_and_the_bars(page, tmp_path):
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    subprocess.run(
        ["chromium", *options, "--window-size=1300,2000", f"--screenshot={picture}", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    from matplotlib.image import imread

    pixels = (255 * imread(picture)[..., :3]).round().astype(int)
    for color in ([0x44, 0x77, 0xAA], [0x80, 0x80, 0x80]):  # a bar; the figure's line at 1
        assert (np.abs(pixels - color).max(axis=-1) <= 2).sum() > 50
