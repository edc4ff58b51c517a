"""Blocks of hidden units: the layers that produce and consume them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class NeuronBlock:
    """Hidden units produced by some layers and consumed by one.

    Attributes
    ----------
    producers : tuple of str
        Names of the layers with one output per unit: one, or two if one gates the other.
    between : tuple of str
        Names of normalizations, depthwise convolutions and other modules with parameters per unit.
    consumer : str
        Name of the only layer that reads the units.
    n_units : int
        Number of units.
    width : int
        Inputs of the consumer per unit: kernel positions, or positions of a flattened image.
    """

    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumer: str
    n_units: int
    width: int
