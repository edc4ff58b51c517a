"""Shared by the conformance tests: one parameter for each factorizer."""

import pytest
from estimators import FACTORIZERS
from sklearn.base import clone


@pytest.fixture(params=FACTORIZERS.values(), ids=FACTORIZERS)
def factorizer(request):
    """An unfitted factorizer of each kind."""
    return clone(request.param)
