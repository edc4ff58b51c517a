"""How a network is calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

#: How inputs count for factorizers that cannot use them: not at all; in the scale of columns
#: before the fit; and also in a refit of values after it, of one factor or of all.
Adaptation = Literal["none", "scale", "finalize_one", "finalize"]


class CalibrationOptions(TypedDict, total=False):
    """The fields of :class:`Calibration` other than the batches."""

    sequential: bool
    adapt: Adaptation
    feedback: bool
    shift_bias: bool
    reestimate_batchnorm: bool
    offload_folder: str | Path | None


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Inputs of a network, and how its layers are fitted to them.

    Parameters
    ----------
    batches : iterable
        Tensors, mappings or tuples. From a tuple the network gets the arguments that its
        ``forward`` requires; further entries count as labels. Optional arguments, such as an
        ``attention_mask``, go by name in mappings. One batch in five is kept aside, beginning with
        the second. Its error decides how far each layer is fitted to the others, and is reported
        as ``layer_error``. Use eight batches or more: with a single one nothing can be kept aside
        and fixed rules apply. Small batches take the least memory.
    sequential : bool, default=True
        Whether each layer is calibrated on what the layers before it, already compressed, make of
        the batches. In memory are the Gram matrices of one layer and what enters a block of layers
        of all batches, which run through it again for each of its layers. Otherwise all layers are
        calibrated in one pass of the dense network, with two Gram matrices for each.
    adapt : {"finalize", "finalize_one", "scale", "none"}, default="finalize"
        What makes factorizers that cannot use calibration inputs themselves take them into
        account: columns of the weight are scaled by what enters them, and after the fit the
        values of all factors, or of the one on the output side, are refitted to the inputs [1]_.
        With "finalize", double sparse factorization also reselects the support of that factor.
        "scale" refits nothing, and "none" only reports the error of outputs.
    feedback : bool, default=True
        Whether each layer also makes up for errors of the layers before it, with sequential
        calibration. The matrix factorized is then the one whose outputs come closest to those in
        the dense network, as far as the batches kept aside confirm it. Each batch runs through the
        dense network too, with the same random numbers.
    shift_bias : bool, default=True
        Whether the bias of a layer, if it has one, makes up for the mean error of its outputs.
    reestimate_batchnorm : bool, default=False
        Whether to re-estimate the statistics of batch normalizations on the batches at the end.
        The batches must be a collection that can be iterated twice. Comparisons should count this
        as training; the report names it.
    offload_folder : str or Path, optional
        Folder for the inputs of the next block, with sequential calibration. Memory then does not
        grow with the number of batches. It must exist, on a disk with room for the inputs of two
        blocks; the files vanish by themselves.

    Raises
    ------
    ValueError
        If a value is not allowed, or batches that are needed twice are not a collection.

    References
    ----------
    .. [1] V. Boža, V. Macko, "Two sparse matrices are better than one: sparsifying neural networks
       with double sparse factorization", ICLR 2025, Section 4.3.
    """

    batches: Iterable[Any]
    sequential: bool = True
    adapt: Adaptation = "finalize"
    feedback: bool = True
    shift_bias: bool = True
    reestimate_batchnorm: bool = False
    offload_folder: str | Path | None = None

    def __post_init__(self) -> None:
        if self.adapt not in get_args(Adaptation):
            raise ValueError(f"adapt must be one of {get_args(Adaptation)}, got {self.adapt!r}.")
        if self.reestimate_batchnorm and isinstance(self.batches, Iterator):
            raise ValueError(
                "calibration must be a collection with reestimate_batchnorm, as its batches are "
                f"used twice, got a {type(self.batches).__name__}: make a list of it."
            )
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(
                f"offload_folder must be an existing folder, got {str(self.folder)!r}."
            )

    @classmethod
    def of(
        cls, given: Iterable[Any] | Calibration | None, options: CalibrationOptions
    ) -> Calibration | None:
        """Return what a caller asks for, None for no calibration.

        Parameters
        ----------
        given : iterable, Calibration or None
            Batches, or what holds them.
        options : dict
            Fields for batches that are given alone.
        """
        if isinstance(given, Calibration):
            if options:
                raise ValueError(f"{', '.join(options)}: give these to Calibration, or batches.")
            return given
        if given is not None:
            return cls(given, **options)
        cls((), **options)  # what is wrong is said in any case
        if options.get("reestimate_batchnorm"):
            raise ValueError(
                "reestimate_batchnorm needs calibration batches, got calibration=None."
            )
        return None

    @property
    def folder(self) -> Path | None:
        """The folder for files."""
        return None if self.offload_folder is None else Path(self.offload_folder)

    @property
    def step(self) -> str:
        """What the report says of it."""
        said: list[str] = [self.adapt]
        said += ["feedback"] if self.sequential and self.feedback else []
        said += ["shifted biases"] if self.shift_bias else []
        return f"{'sequential ' if self.sequential else ''}calibration ({', '.join(said)})"
