"""Figures and HTML of products of factors."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from matfact import backend
from matfact._figures import new_figure
from matfact.operators._factor import Factor

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

#: Maximum rows and columns of a panel; larger factors show the maximum of each tile.
_PIXELS = 512


def plot_factors(factors: Sequence[Factor], figure: Any = None) -> Any:
    """Draw supports and magnitudes of the factors, one panel each, on one colour scale."""
    magnitudes = [_magnitudes(factor) for factor in factors]
    largest = max(float(np.max(image, initial=0.0)) for image in magnitudes) or 1.0
    widths = [factor.shape[1] / factor.shape[0] for factor in factors]
    ratios = [min(max(width, 0.3), 3.0) for width in widths]
    if figure is None:
        figure = new_figure(2.6 * sum(ratios) + 1.0, 3.2, dpi=150)
    panels = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    for axes, factor, image in zip(panels, factors, magnitudes, strict=True):
        rows, columns = factor.shape
        # Entries that are not stored stay blank, unlike small stored values.
        shown = axes.imshow(
            np.ma.masked_equal(image, 0.0), cmap="viridis", vmin=0.0, vmax=largest,
            interpolation="nearest", extent=(0, columns, rows, 0), aspect="auto",
        )  # fmt: skip
        axes.set_title(f"{rows}×{columns}\n{factor.nnz} values", fontsize=8)
        axes.set_xticks([0, columns])
        axes.set_yticks([0, rows])
    figure.colorbar(shown, ax=list(panels), label="magnitude")
    return figure


def to_html(caption: str, factors: Sequence[Factor]) -> str:
    """Return a table of factors, for notebooks."""
    cells = "".join(
        f"<tr><td>{escape(type(factor).__name__)}</td>"
        f"<td>{factor.shape[0]}×{factor.shape[1]}</td><td>{factor.nnz:,}</td>"
        f"<td>{factor.nnz / max(1, factor.shape[0] * factor.shape[1]):.1%}</td></tr>"
        for factor in factors
    )
    return (
        f"<table><caption>{escape(caption)}</caption>"
        "<thead><tr><th>factor</th><th>shape</th><th>values</th><th>density</th></tr></thead>"
        f"<tbody>{cells}</tbody></table>"
    )


def _magnitudes(factor: Factor) -> np.ndarray:
    """Return the magnitudes of a factor's entries, or of a large factor the maximum per tile."""
    image = np.abs(backend.to_numpy(factor.toarray()))
    for axis in (0, 1):
        size = image.shape[axis]
        if size > _PIXELS:
            starts = np.arange(_PIXELS) * size // _PIXELS
            image = np.maximum.reduceat(image, starts, axis=axis)
    return image


class Displayed:
    """What draws a product of factors, and shows it in notebooks."""

    factors: Any

    def plot(self, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
        """Draw the positions and magnitudes of the values of each factor.

        Parameters
        ----------
        figure : matplotlib.figure.Figure or SubFigure, optional
            Figure to draw into; a new one by default.

        Returns
        -------
        matplotlib.figure.Figure or SubFigure
            One panel per factor, in the order of the product. Entries that are not stored are
            blank. Save it with its ``savefig``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        return plot_factors(self.factors, figure)

    def _repr_html_(self) -> str:
        product: Any = self
        return to_html(
            f"FactorProduct {product.shape[0]}×{product.shape[1]}: {product.nnz:,} values "
            f"({product.density:.1%}), {product.flops:,} FLOPs, {product.nbytes():,} bytes",
            self.factors,
        )
