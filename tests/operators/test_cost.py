"""The rule that chooses between factors and dense matrix."""

import numpy as np
import pytest

from matfact.operators._dispatch import cost


def test_work_is_interpolated_between_batches_and_stays_beyond_them():
    first, second = cost.WORK["csr"][:2]
    between = (cost.BATCHES[0] + cost.BATCHES[1]) / 2
    assert cost.work({"csr": 10}, between) == pytest.approx(10 * (first + second) / 2)
    assert cost.work({"csr": 1}, 10**6) == cost.WORK["csr"][-1]
    assert cost.work({"csr": 2, "block": 3}, 1) == pytest.approx(2 * first + 3)


@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_few_values_pay_and_as_many_as_entries_do_not(batch):
    rows = {"row": 512}
    paying = [
        cost.factors_pay(rows | {"csr": int(density * 256 * 256)}, (256, 256), batch)
        for density in np.arange(0.05, 1.25, 0.05)
    ]
    assert paying[0]
    assert not paying[-1]
    assert paying == sorted(paying, reverse=True)
