"""Sequential calibration that ends early, in other modes, and in parallel threads."""

import copy
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch.calibration.sequential import sequential_statistics  # noqa: E402
from matfact.torch.running._random import RandomState, drawing  # noqa: E402


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def test_a_network_that_cleans_up_with_modules_ends():
    class Cleaning(nn.Sequential):
        def forward(self, x):
            try:
                return super().forward(x)
            finally:
                try:
                    self[2](x)
                finally:
                    self[2](x)

    model = Cleaning(Two(), Two(), Two())
    stops = sequential_statistics(model, ["0.up", "1.up"], [torch.randn(3, 5)])
    next(stops)
    closing = threading.Thread(target=stops.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert all("forward" not in vars(module) for module in model.modules())


def test_callers_may_be_in_inference_mode():
    model = nn.Sequential(Two(), Two())
    names, batches = ["0.up", "0.down", "1.up", "1.down"], [torch.randn(9, 5) for _ in range(3)]

    def grams():
        stops = sequential_statistics(copy.deepcopy(model), names, batches, paired=True)
        return [statistics.by_matrix()[0][0].inputs.gram for _, statistics in stops]

    expected = grams()
    with torch.inference_mode():
        found = grams()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other)


def test_runs_beside_each_other_leave_the_compiler_and_the_generators_as_they_were():
    models = [nn.Sequential(Two(), nn.Dropout(), Two()) for _ in range(2)]
    runs = [sequential_statistics(model, ["0.up", "2.up"], [torch.randn(3, 5)]) for model in models]
    state = torch.get_rng_state()
    for run in runs:
        next(run)
    for run in runs:  # the first to come is the first to leave
        run.close()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_that_draw_wait_for_each_other():
    state, cpu = torch.get_rng_state(), torch.device("cpu")
    is_drawing, is_asked = threading.Event(), threading.Event()

    def draw():
        with drawing(RandomState.seeded(8, cpu)):
            is_drawing.set()
            is_asked.wait(0.2)

    other = threading.Thread(target=draw)
    other.start()
    is_drawing.wait()
    with drawing(RandomState.seeded(7, cpu)):
        is_asked.set()
        other.join()
        drawn = torch.rand(2)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), state)
