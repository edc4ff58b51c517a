"""Shared by the conformance tests: one parameter for each factorizer."""

import pytest
from sklearn.base import clone

from tests.conformance.estimators import FACTORIZERS, WITH_DENSITY


@pytest.fixture(params=FACTORIZERS.values(), ids=FACTORIZERS)
def factorizer(request):
    """An unfitted factorizer of each kind."""
    return clone(request.param)


@pytest.fixture(params=WITH_DENSITY.values(), ids=WITH_DENSITY)
def with_density(request):
    """An unfitted factorizer of each kind that can be asked for a number of stored values."""
    return clone(request.param)
