"""Shared by the conformance tests: one parameter for each factorizer."""

import pytest
from sklearn.base import clone

from tests.conformance.estimators import FACTORIZERS


@pytest.fixture(params=FACTORIZERS.values(), ids=FACTORIZERS)
def factorizer(request):
    """An unfitted factorizer of each kind."""
    return clone(request.param)
