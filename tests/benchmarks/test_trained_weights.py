"""Promises about trained weights, kept on the attention matrices of a sentence transformer."""

import re

import numpy as np
import pytest

from matfact import BlockSVD, DoubleSparseFactorizer, LowRank, MonarchProjector, Palm4MSA
from matfact.compare import load_weights

weights = load_weights()
SQUARE = [
    W.astype(np.float32)
    for name, W in weights.items()
    if re.search("attention", name) and W.shape == (384, 384)
]
pytestmark = pytest.mark.skipif(len(SQUARE) != 24, reason="needs the extra demo")


def mean_normalized(estimator, matrices):
    return np.mean([estimator.fit(W).normalized_err_ for W in matrices])


@pytest.mark.parametrize(
    "matrices",
    [slice(0, None, 8), pytest.param(slice(None), marks=pytest.mark.slow)],
    ids=["three", "all"],
)
@pytest.mark.parametrize(
    ("estimator", "bound"),
    [(DoubleSparseFactorizer(density=0.25), 0.60), (Palm4MSA(density=0.25), 0.75)],
    ids=["dsf", "palm4msa"],
)
def test_sparse_products_beat_the_published_errors(estimator, bound, matrices):
    assert mean_normalized(estimator, SQUARE[matrices]) <= bound


def test_structured_projections_are_no_worse_than_the_truncated_svd():
    for W in SQUARE[::6]:
        svd = LowRank(density=0.25).fit(W)
        assert 1.2 < svd.normalized_err_ < 1.7
        for estimator in (MonarchProjector(density=0.25), BlockSVD(density=0.25)):
            assert estimator.fit(W).reconstruction_err_ <= svd.reconstruction_err_ * (1 + 1e-5)
