"""Comparison of methods on real matrices: study, table and figure."""

from matfact.compare._matrices import DEFAULT_SIZES, Cut, cut_matrices
from matfact.compare._plot import plot_comparison, plot_history, save_figure
from matfact.compare._report import summary_table
from matfact.compare._stored import StoredMatrix
from matfact.compare._study import compare_projections
from matfact.compare._table import Comparison, ComparisonRow, SummaryRow
from matfact.compare._weights import Weights, load_weights
from matfact.factorizers._registry import COMPARED as METHODS

__all__ = [
    "DEFAULT_SIZES",
    "METHODS",
    "Comparison",
    "ComparisonRow",
    "Cut",
    "StoredMatrix",
    "SummaryRow",
    "Weights",
    "compare_projections",
    "cut_matrices",
    "load_weights",
    "plot_comparison",
    "plot_history",
    "save_figure",
    "summary_table",
]
