"""Products of chains, compiled and as the array libraries do them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.kernels import chains

SMALL = st.integers(1, 4)


@settings(deadline=None, max_examples=25)
@given(SMALL, SMALL, SMALL, SMALL, st.integers(1, 20), SMALL, st.booleans())
def test_merged_blocks_are_the_product(a, d, b, radix, terms, width, is_complex):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)

    left, right = draw(a, d, b, radix * terms), draw(a * radix, terms * d, width)
    expected = chains.merge(torch.asarray(left), torch.asarray(right))
    np.testing.assert_allclose(chains.merge(left, right), expected.numpy(), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_merged_blocks_keep_the_dtype(dtype):
    left, right = np.ones((2, 3, 2, 2), dtype), np.ones((4, 3, 5), dtype)
    assert chains.merge(left, right).dtype == dtype
