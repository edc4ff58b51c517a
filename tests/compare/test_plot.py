import sys

import numpy as np
import pytest

from matfact import LowRank, compare_projections
from matfact.compare import (
    Comparison,
    ComparisonRow,
    plot_comparison,
    plot_history,
    save_figure,
)

pytest.importorskip("matplotlib")

RNG = np.random.RandomState(0)
MATRICES = [RNG.standard_normal((n, n)) for n in (24, 16, 16)]


@pytest.fixture(scope="module")
def table():
    return compare_projections(MATRICES, ["lowrank", "magnitude"], densities=[0.5, 0.25])


def test_small_dots_are_fits_and_large_ones_their_means(table):
    panels = plot_comparison(table).axes
    assert [axes.get_title() for axes in panels] == ["density 0.25", "density 0.5"]
    for axes, density in zip(panels, (0.25, 0.5), strict=True):
        baseline, dots, means = axes.get_lines()
        errors = {
            size: [
                r.normalized_error for r in table
                if (r.method, r.size, r.requested_density) == ("lowrank", size, density)
            ]
            for size in ("16", "24")
        }  # fmt: skip
        assert [text.get_text() for text in axes.get_xticklabels()] == ["16", "24"]
        np.testing.assert_allclose(dots.get_ydata(), [*errors["16"], *errors["24"]])
        np.testing.assert_allclose(means.get_ydata(), [np.mean(e) for e in errors.values()])
        assert means.get_markersize() > dots.get_markersize()
        assert baseline.get_ydata()[0] == 1.0


def test_every_panel_shows_every_point():
    rows = [
        ComparisonRow("w", 8, 8, "8", "dsf", density, "ok", normalized_error=error)
        for density, error in ((0.1, 0.5), (0.3, 4.0), (0.5, 0.7))
    ]
    for axes in plot_comparison(Comparison(rows)).axes:
        bottom, top = axes.get_ylim()
        assert bottom == 0.0
        assert top > 4.0


def test_histories_show_objectives_of_zero():
    fits = {f"{i}": LowRank(rank=2).fit(np.eye(3)) for i in range(10)}
    for i, fit in enumerate(fits.values()):
        fit.history_ = {"objective": [1e-3, i * 1e-6], "seconds": [0.1, 0.2]}
    axes = plot_history(fits).axes[0]
    places = axes.transData.transform([(0.2, i * 1e-6) for i in range(10)])
    assert (places[:, 1] >= axes.bbox.y0).all()
    assert (np.diff(places[:, 1]) > 0).all()
    styles = {(line.get_color(), line.get_marker()) for line in axes.get_lines()}
    assert len(styles) == 10


def test_failed_fits_are_left_out():
    table = compare_projections([np.eye(8)], ["lowrank", "magnitude"], densities=[0.05])
    _, dots, means = plot_comparison(table).axes[0].get_lines()
    assert len(dots.get_ydata()) == len(means.get_ydata()) == 0


def test_figure_is_written_as_png(table, tmp_path):
    save_figure(plot_comparison(table), tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_comparison_is_drawn(tmp_path):
    save_figure(plot_comparison(Comparison([])), tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 0


def test_matplotlib_is_named_where_it_is_missing(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="extra 'plots'"):
        plot_comparison(table)


def test_labels_stand_at_the_last_points_without_overlap():
    rows = [
        ComparisonRow("w", 8, 8, "8", method, 0.25, "ok", normalized_error=error)
        for method, error in (("dsf", 0.5), ("lowrank", 1.5), ("monarch", 1.5), ("blocksvd", 1.51))
    ]
    axes = plot_comparison(Comparison(rows)).axes[0]
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert np.diff(sorted(heights.values())).min() >= 0.05
    for name, error in (("Double sparse (DSF)", 0.5), ("Magnitude pruning", 1.0)):
        np.testing.assert_allclose(heights[name], error / axes.get_ylim()[1])
    assert abs(heights["Monarch, best blocks"] - 1.5 / axes.get_ylim()[1]) < 0.1
