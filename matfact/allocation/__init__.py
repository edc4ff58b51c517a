"""Allocation of a budget to layers: the method and density of each."""

from matfact.allocation._budget import Allocation, allocate, allocate_uniformly
from matfact.allocation._curves import Option, apply_seconds, interpolate, measure_options
from matfact.allocation._knapsack import Selection, select
from matfact.allocation._triples import (
    StripRanks,
    alds_ranks,
    magnitude_scores,
    rank_triples,
    relative_error_scores,
    strip_spectra,
    truncated_blocks,
)

__all__ = [
    "Allocation",
    "Option",
    "Selection",
    "StripRanks",
    "alds_ranks",
    "allocate",
    "allocate_uniformly",
    "apply_seconds",
    "interpolate",
    "magnitude_scores",
    "measure_options",
    "rank_triples",
    "relative_error_scores",
    "select",
    "strip_spectra",
    "truncated_blocks",
]
