"""Hidden units of a network: which layers write them, and which one reads them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class NeuronBlock:
    """Hidden units that some layers write and one layer reads.

    Attributes
    ----------
    producers : tuple of str
        Names of the layers each of whose outputs belongs to a unit: one, or two where one gates
        the other.
    between : tuple of str
        Names of the normalizations, depthwise convolutions and other modules with parameters of
        each unit.
    consumer : str
        Name of the layer that reads the units, and no other does.
    n_units : int
        How many there are.
    width : int
        Inputs of the consumer for each unit: places of its kernel, or of a flattened image.
    """

    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumer: str
    n_units: int
    width: int
