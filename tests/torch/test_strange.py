"""Networks with side effects, or with passes that differ between batches and threads."""

import contextvars
import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import compress  # noqa: E402


def batches(n, seed=0, n_samples=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n_samples, 16, generator=generator) for _ in range(n)]


def layers(n=2):
    torch.manual_seed(0)
    return [nn.Linear(16, 16) for _ in range(n)]


class Routed(nn.Module):
    """Each token goes to one of two experts."""

    def __init__(self):
        super().__init__()
        self.first, self.router, *experts = layers(4)
        self.experts = nn.ModuleList(experts)

    def forward(self, x):
        x = torch.relu(self.first(x))
        chosen = self.router(x).argmax(1) % 2
        for i, expert in enumerate(self.experts):
            x = torch.where(chosen[:, None] == i, torch.zeros_like(x), x).index_add(
                0, torch.nonzero(chosen == i)[:, 0], expert(x[chosen == i])
            )
        return x


def test_experts_that_get_other_numbers_of_tokens_in_a_later_batch():
    # Of the batches, only some differ in the numbers of tokens from the dense network.
    report = compress(Routed(), density=0.3, calibration=batches(20)).report
    assert [row.status for row in report] == ["compressed"] * 4
    assert any("no counterparts" in row.message for row in report)


class Writing(nn.Module):
    """Normalizes what it is given in place, and adds to a list it is given."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers()

    def forward(self, x, seen):
        x.sub_(1.0).mul_(2.0)
        seen.append(x.mean())
        return self.last(torch.relu(self.first(x))) + sum(seen)


class Normalized(nn.Module):
    """The same, written into tensors of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers()

    def forward(self, x, seen):
        return self.last(torch.relu(self.first((x - 1.0) * 2.0)))


@pytest.mark.parametrize("sequential", [True, False])
def test_a_network_may_write_to_its_batch(sequential):
    given = [(x, []) for x in batches(6)]
    before = copy.deepcopy(given)
    found = [
        compress(kind(), density=0.5, calibration=given, sequential=sequential)
        for kind in (Writing, Normalized)
    ]
    for (x, seen), (y, _) in zip(given, before, strict=True):
        assert torch.equal(x, y)
        assert not seen
    for a, b in zip(*(model.parameters() for model, _ in found), strict=True):
        assert torch.equal(a, b)
    assert [r.layer_error for r in found[0].report] == [r.layer_error for r in found[1].report]


@pytest.mark.parametrize("offload", [False, True])
def test_scripted_modules_are_passed(offload, tmp_path):
    first, last = layers()
    model = nn.Sequential(first, torch.jit.script(nn.ReLU()), last)
    folder = tmp_path if offload else None
    report = compress(model, density=0.5, calibration=batches(6), offload_folder=folder).report
    assert all(row.layer_error > 0 for row in report)


def test_a_layer_may_be_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, _ = layers()
            self.conv = nn.Conv1d(1, 4, 3)

        def forward(self, x):
            return self.conv(input=self.linear(input=x)[:, None])

    model = Named()
    small = compress(model, "magnitude", density=1.0, calibration=batches(6)).model
    x = batches(1, seed=1)[0]
    torch.testing.assert_close(small(x), model(x))


def test_passes_see_the_context_of_the_caller():
    scale = contextvars.ContextVar("scale", default=1.0)
    entered = set()

    class Scaled(nn.Sequential):
        def forward(self, x):
            entered.add(scale.get())
            return super().forward(x * scale.get())

    token = scale.set(3.0)
    try:
        compress(Scaled(*layers()), density=0.5, calibration=batches(6), inplace=True)
    finally:
        scale.reset(token)
    assert entered == {3.0}
