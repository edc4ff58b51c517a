"""Comparisons at the same bytes."""

import numpy as np
import pytest

from matfact import (
    DoubleSparseFactorizer,
    LowRank,
    MagnitudePruner,
    Quantized,
    compare_projections,
)
from matfact.cli._compare import _study
from matfact.compare import plot_comparison, summary_table
from matfact.factorizers import _at_bits
from matfact.factorizers._at_bits import _quantized_bits as taken
from matfact.factorizers._at_bits import fit_at_bits
from matfact.metrics import DensityTooSmall

W = np.random.default_rng(0).standard_normal((96, 120)).astype(np.float32)
METHODS = [
    ("dsf", DoubleSparseFactorizer(max_iter=10)),
    ("magnitude", MagnitudePruner()),
    ("lowrank", LowRank()),
    "double_binary",
]


@pytest.fixture(scope="module")
def comparison():
    return compare_projections({"W": W}, METHODS, bits=[2, 4.5])


def test_every_method_gets_the_same_bytes(comparison):
    assert len(comparison) == 8
    for row in comparison:
        assert row.status == "ok"
        assert 0.75 * row.requested_bits < row.bits_per_weight <= 1.005 * row.requested_bits
        assert row.budget == f"{row.requested_bits:g} bits"


def test_more_bits_lower_every_error(comparison):
    few, many = ([r for r in comparison if r.requested_bits == b] for b in (2, 4.5))
    assert all(b.relative_error < a.relative_error for a, b in zip(few, many, strict=True))
    assert {row.value_bits for row in few if row.method != "double_binary"} <= {3, 4, 5, 6, 8}


def test_tables_and_figures_tell_bits(comparison, tmp_path):
    assert "normalized" not in "".join(str(c.header) for c in summary_table(comparison).columns)
    assert plot_comparison(comparison).axes[0].get_xlabel() == "bits a weight"
    comparison.to_html(tmp_path / "page.html")
    assert "4.5 bits" in (tmp_path / "page.html").read_text()
    assert comparison.metadata["bits"] == [2.0, 4.5]
    comparison.to_json(tmp_path / "table.json")
    again = type(comparison).from_json(tmp_path / "table.json")
    assert [row.budget for row in again] == [row.budget for row in comparison]


@pytest.mark.parametrize("bits", [[], 2, [0], [True], [-1.0], ["2"]])
def test_bits_are_validated(bits):
    with pytest.raises(ValueError, match="bits must"):
        compare_projections({"W": W}, METHODS, bits=bits)


def test_too_few_bits_are_refused():
    with pytest.raises(DensityTooSmall, match=r"bits=0.01 are too few for LowRank"):
        fit_at_bits(LowRank(), W, 0.01)


def test_a_fit_at_bits_keeps_to_them():
    fitted = fit_at_bits(MagnitudePruner(), W, 3)
    assert 2.9 < fitted.bits_per_weight_ <= 3.015


def test_the_best_of_complete_fits_is_taken():
    fitted = fit_at_bits(DoubleSparseFactorizer(max_iter=10), W, 3)
    for bits in (3, 4, 5, 6, 8):
        density = fitted.estimator.density if bits == fitted.bits else 2.3 / bits
        other = Quantized(DoubleSparseFactorizer(density=density, max_iter=10), bits=bits).fit(W)
        if other.bits_per_weight_ <= 3:
            assert fitted.reconstruction_err_ <= other.reconstruction_err_


def test_a_single_candidate_also_keeps_to_the_bits(monkeypatch):
    # As if positions took more than expected.
    monkeypatch.setattr(
        _at_bits, "_quantized_bits", lambda product, bits: 0.9 * taken(product, bits)
    )
    monkeypatch.setattr(_at_bits, "VALUE_BITS", (4,))
    assert fit_at_bits(MagnitudePruner(), W, 3).bits_per_weight_ <= 3.015


def test_methods_and_budgets_are_checked_before_weights_are_read(tmp_path):
    run = {"methods": ["dsf"], "densities": [0.25], "bits": [40.0]}
    with pytest.raises(ValueError, match=r"bits must be a number above 0 and at most 16, got 40.0"):
        _study(tmp_path / "none.safetensors", {}, run, tmp_path, None)
