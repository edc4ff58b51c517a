"""Density and bits of a factorizer, wherever it takes them."""

from __future__ import annotations

from numbers import Integral

from matfact import metrics
from matfact.factorizers import BaseFactorizer, DoubleSparseFactorizer, Quantized
from matfact.operators._quantized import BITS


def has_bits(factorizer: BaseFactorizer) -> bool:
    """Whether a factorizer has bits of its own, of values or of weights."""
    return "bits" in factorizer.get_params(deep=False)


def has_density(factorizer: BaseFactorizer) -> bool:
    """Whether the density of a factorizer, or of the one that it quantizes, can be set."""
    return _inner(factorizer).has_density


def density_of(factorizer: BaseFactorizer | None) -> float | None:
    """Return the requested density, None if there is none."""
    return None if factorizer is None else getattr(_inner(factorizer), "density", None)


def name_of(factorizer: BaseFactorizer) -> str:
    """Return the class of a factorizer, with that of the one that it quantizes."""
    name = type(factorizer).__name__
    if isinstance(factorizer, Quantized):
        return f"{name}({type(_inner(factorizer)).__name__})"
    return name


def configured(
    factorizer: BaseFactorizer, density: float | None, bits: float | None
) -> BaseFactorizer:
    """Return an unfitted factorizer with a density and bits; None leaves each as it is.

    Factorizers with a parameter `bits` get them; all others are quantized.

    Raises
    ------
    ValueError
        If the factorizer has no density, or the bits are not allowed.
    """
    if density is not None:
        metrics.check_density(density)
        if not has_density(factorizer):
            raise ValueError(
                f"density must be None with {type(factorizer).__name__}, which has no such "
                f"parameter, got {density}."
            )
        inner = _inner(factorizer).set_params(density=density)
        if isinstance(factorizer, Quantized):
            factorizer = factorizer.set_params(estimator=inner)
    if bits is None:
        return factorizer
    if has_bits(factorizer):
        return factorizer.set_params(bits=bits)
    check_value_bits(bits)
    return Quantized(factorizer, bits=int(bits))


def check_value_bits(bits: object) -> None:
    """Raise ``ValueError`` for bits that values cannot have."""
    if bits is None:
        return
    if not isinstance(bits, Integral) or isinstance(bits, bool) or int(bits) not in BITS:
        raise ValueError(
            f"value_bits must be None or an integer from {BITS[0]} to {BITS[-1]}, got {bits!r}."
        )


def _inner(factorizer: BaseFactorizer) -> BaseFactorizer:
    """Return the factorizer that another quantizes, or itself."""
    if not isinstance(factorizer, Quantized):
        return factorizer
    return DoubleSparseFactorizer() if factorizer.estimator is None else factorizer.estimator
