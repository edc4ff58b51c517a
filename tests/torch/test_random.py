"""Snapshots of random number generators can be restored repeatedly."""

import itertools
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch.running._random import RandomState, batch_states, drawing  # noqa: E402

CPU = torch.device("cpu")


def drawn():
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def test_a_snapshot_brings_all_generators_back():
    state = RandomState.now(CPU)
    first = drawn()
    assert drawn() != first
    state.restore()
    assert drawn() == first


def test_draws_inside_follow_the_state_and_those_outside_do_not_notice():
    state = RandomState.seeded(3, CPU)
    before = RandomState.now(CPU)
    expected = drawn()
    before.restore()
    with drawing(state):
        first = drawn()
    with drawing(state):
        assert drawn() == first
    assert drawn() == expected
    assert not set(first) & set(expected)


def test_the_state_comes_back_after_an_error():
    before = RandomState.now(CPU)
    expected = drawn()
    before.restore()
    with pytest.raises(KeyError), drawing(RandomState.seeded(0, CPU)):
        {drawn(): 0}[()]
    assert drawn() == expected


def test_states_of_batches_differ_and_follow_the_seed():
    def values():
        found = []
        for state in itertools.islice(batch_states(nn.Identity()), 3):
            with drawing(state):
                found.append(drawn())
        return found

    torch.manual_seed(0)
    first, again = values(), values()  # the second too: nothing is used up
    torch.manual_seed(1)
    other = values()
    assert first == again
    assert len({*first, *other}) == 6


def test_states_of_batches_are_those_at_the_call():
    torch.manual_seed(0)
    states, expected = batch_states(nn.Identity()), batch_states(nn.Identity())
    second = [next(expected) for _ in range(2)][1]
    next(states)
    torch.rand(5)
    assert torch.equal(next(states).host, second.host)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_accelerators_come_back():
    device = torch.device("cuda", 0)
    state = RandomState.now(device)
    first = torch.rand(4, device=device)
    with drawing(RandomState.seeded(0, device)):
        inside = torch.rand(4, device=device)
    second = torch.rand(4, device=device)
    state.restore()
    assert torch.equal(torch.rand(4, device=device), first)
    assert torch.equal(torch.rand(4, device=device), second)
    with drawing(RandomState.seeded(0, device)):
        assert torch.equal(torch.rand(4, device=device), inside)
