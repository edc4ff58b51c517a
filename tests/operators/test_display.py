"""Display of products."""

import numpy as np
import pytest

from matfact import DoubleSparseFactorizer, MonarchProjector
from matfact.compare import plot_history
from matfact.operators import DenseFactor, FactorProduct, SparseFactor
from matfact.transforms import hadamard

pytest.importorskip("matplotlib")


def test_each_factor_has_a_panel_blank_where_no_value_stands():
    A = np.array([[0.0, -2.0, 0.0], [1.0, 0.0, 0.0]])
    product = FactorProduct([SparseFactor.from_dense(A), DenseFactor(np.ones((3, 4)))])
    first, second, _ = product.plot().axes
    np.testing.assert_array_equal(first.images[0].get_array().filled(0.0), np.abs(A))
    np.testing.assert_array_equal(first.images[0].get_array().mask, A == 0)
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0.0, 2.0)
    assert "2×3\n2 values" in first.get_title()


def test_single_values_stay_visible_in_large_factors():
    W = np.zeros((2000, 700))
    W[1234, 567] = 1.0
    image = FactorProduct([SparseFactor.from_dense(W)]).plot().axes[0].images[0].get_array()
    assert max(image.shape) <= 512
    assert image.filled(0.0).sum() == 1.0


@pytest.mark.parametrize(
    "product",
    [
        hadamard(16),
        FactorProduct([DenseFactor(np.zeros((3, 2)))]),
        MonarchProjector().fit(np.random.RandomState(0).randn(12, 18)).operator_,
    ],
)
def test_structured_and_empty_products_are_drawn(product, tmp_path):
    product.plot().savefig(tmp_path / "factors.png")
    assert (tmp_path / "factors.png").stat().st_size > 1000


def test_notebooks_show_a_row_for_each_factor():
    html = hadamard(8)._repr_html_()
    assert html.count("<tr>") == 1 + len(hadamard(8))
    assert "8×8" in html


def test_histories_are_drawn_over_time():
    model = DoubleSparseFactorizer(density=0.5).fit(np.random.RandomState(0).randn(16, 16))
    (line,) = plot_history({"DSF": model}).axes[0].get_lines()
    np.testing.assert_array_equal(line.get_ydata(), model.history_["objective"])
    np.testing.assert_array_equal(line.get_xdata(), model.history_["seconds"])
