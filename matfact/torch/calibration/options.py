"""Options of calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

#: How inputs are used for factorizers that do not use them: not at all; for the scale of columns
#: before the fit; and also for a refit of values after it, of one factor or all.
Adaptation = Literal["none", "scale", "finalize_one", "finalize"]


class CalibrationOptions(TypedDict, total=False):
    """Fields of `Calibration` except the batches."""

    sequential: bool
    adapt: Adaptation
    feedback: bool
    shift_bias: bool
    match_blocks: bool
    reestimate_batchnorm: bool
    offload_folder: str | Path | None


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration batches, and how layers are fitted to them.

    Parameters
    ----------
    batches : iterable
        Tensors, mappings or tuples. Of a tuple, the network gets the required arguments of its
        ``forward``; further entries count as labels. Use mappings for optional arguments, such as
        an ``attention_mask``. Every fifth batch, beginning with the second, is held out: its error
        decides how closely each layer is fitted to the others, and is reported as ``layer_error``.
        Use at least eight batches; a single batch cannot be held out, and fixed rules apply. Small
        batches take the least memory.
    sequential : bool, default=True
        Whether to calibrate each layer on the outputs of the already compressed layers before it.
        Each block of layers is replayed for each of its layers. Memory holds the Gram matrices of
        one layer and the inputs of one block for all batches. Otherwise all layers are calibrated
        in a single pass of the dense network, with two Gram matrices per layer in memory.
    adapt : {"finalize", "finalize_one", "scale", "none"}, default="finalize"
        How to use inputs for factorizers that do not use them themselves. Columns of the weight are
        scaled by the size of their inputs; after the fit, "finalize" refits the values of all
        factors to the inputs and "finalize_one" those of the output-side factor (Boža & Macko,
        2025). With "finalize", double sparse factorization also reselects the support of that
        factor. "scale" refits nothing, and "none" only reports the error of the outputs. Codes of
        few bits are never scaled or refit.
    feedback : bool, default=True
        Whether each layer also corrects errors of the layers before it, with sequential
        calibration. The matrix to factorize is then the one that best reproduces the outputs in the
        dense network, as far as held-out batches confirm it. Each batch also runs through the dense
        network, with the same random numbers.
    shift_bias : bool, default=True
        Whether the bias of a layer, if it has one, corrects the mean error of its outputs.
    match_blocks : bool, default=False
        Whether each block, such as a transformer layer, is trained after its layers are replaced:
        stored values, biases and norms, on fixed supports, to give the outputs that the block has
        in the dense network. What is frozen stays, unless the whole network is. Held-out batches
        decide how long, and never get worse. Needs sequential calibration with feedback; memory
        also holds the outputs of one block for all batches. The report says what it gained: much
        with many batches, little with few. The network need not gain as much as its blocks: measure
        it, and see `distill`.
    reestimate_batchnorm : bool, default=False
        Whether to re-estimate batch-normalization statistics on the batches at the end. The batches
        must be a collection that can be iterated twice. Comparisons should count this as training;
        the report mentions it.
    offload_folder : str or Path, optional
        Existing folder for the inputs of the next block, with sequential calibration. Memory then
        does not grow with the number of batches. The disk needs room for the inputs of two blocks;
        the files are removed automatically.

    Raises
    ------
    ValueError
        If a value is not allowed, or if batches are needed twice but are not a collection.

    References
    ----------
    - V. Boža, V. Macko, "Two sparse matrices are better than one: sparsifying neural networks
      with double sparse factorization", ICLR 2025, Section 4.3.
    """

    batches: Iterable[Any]
    sequential: bool = True
    adapt: Adaptation = "finalize"
    feedback: bool = True
    shift_bias: bool = True
    match_blocks: bool = False
    reestimate_batchnorm: bool = False
    offload_folder: str | Path | None = None

    def __post_init__(self) -> None:
        if self.adapt not in get_args(Adaptation):
            raise ValueError(f"adapt must be one of {get_args(Adaptation)}, got {self.adapt!r}.")
        if self.match_blocks and not (self.sequential and self.feedback):
            raise ValueError(
                "match_blocks needs sequential=True and feedback=True, got "
                f"sequential={self.sequential} and feedback={self.feedback}."
            )
        if self.reestimate_batchnorm and isinstance(self.batches, Iterator):
            raise ValueError(
                "calibration must be a collection with reestimate_batchnorm, since its batches are "
                f"used twice, got a {type(self.batches).__name__}: make it a list."
            )
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(
                f"offload_folder must be an existing folder, got {str(self.folder)!r}."
            )

    @classmethod
    def of(
        cls, given: Iterable[Any] | Calibration | None, options: CalibrationOptions
    ) -> Calibration | None:
        """Return the calibration requested by a caller, or None.

        Parameters
        ----------
        given : iterable, Calibration or None
            Batches or a calibration.
        options : dict
            Fields for plain batches.
        """
        if isinstance(given, Calibration):
            if options:
                raise ValueError(f"{', '.join(options)}: pass these to Calibration.")
            return given
        if given is not None:
            return cls(given, **options)
        cls((), **options)  # raises for invalid options in any case
        for name in ("match_blocks", "reestimate_batchnorm"):
            if options.get(name):
                raise ValueError(f"{name} needs calibration batches, got calibration=None.")
        return None

    @property
    def folder(self) -> Path | None:
        """Folder for files."""
        return None if self.offload_folder is None else Path(self.offload_folder)

    @property
    def step(self) -> str:
        """Description for the report."""
        said: list[str] = [self.adapt]
        said += ["feedback"] if self.sequential and self.feedback else []
        said += ["shifted biases"] if self.shift_bias else []
        return f"{'sequential ' if self.sequential else ''}calibration ({', '.join(said)})"
