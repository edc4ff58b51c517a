"""Budgets over many layers: which method and how many values each of them gets."""

from matfact.allocation._budget import Allocation, allocate, allocate_uniformly
from matfact.allocation._curves import Option, apply_seconds, interpolate, measure_options
from matfact.allocation._knapsack import Selection, select

__all__ = [
    "Allocation",
    "Option",
    "Selection",
    "allocate",
    "allocate_uniformly",
    "apply_seconds",
    "interpolate",
    "measure_options",
    "select",
]
