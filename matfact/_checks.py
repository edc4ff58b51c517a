"""Checks of arguments that several parts share."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def check_positive_int(name: str, value: Any) -> int:
    """Return `value`, the parameter `name`; raise ``ValueError`` unless it is an integer from 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return int(value)
