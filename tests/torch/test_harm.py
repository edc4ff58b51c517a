"""Harm of errors in each layer's outputs to the output of the network."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from matfact.torch import output_harm, soft_cross_entropy  # noqa: E402


class Network(nn.Module):
    """Three layers, of which the last adds little to the output, and one that is not called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.much, self.little, self.unused = (nn.Linear(16, 16, bias=i > 0) for i in range(3))

    def forward(self, x):
        return self.much(x) + 0.01 * self.little(x)


def batches(n=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=generator) for _ in range(n)]


def test_harm_is_the_squared_share_of_the_output():
    found = output_harm(Network(), batches())
    # The output is nearly that of `much`, so a relative error of its rows is one of the output.
    assert found["much"] == pytest.approx(1.0, rel=0.4)
    assert found["little"] == pytest.approx(1e-4, rel=0.5)
    assert "unused" not in found  # a weight of 0 would have it compressed to nothing


def test_small_noise_gives_the_same_harm_of_a_linear_network():
    one, other = (output_harm(Network(), batches(), noise=noise) for noise in (0.1, 0.001))
    assert other["much"] == pytest.approx(one["much"], rel=1e-2)


def test_it_repeats_and_leaves_random_numbers_and_the_network_alone():
    model = Network().train()
    state = torch.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = (output_harm(model, batches()) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training
    assert not any(each._forward_hooks for each in model.modules())


def test_networks_that_draw_random_numbers_are_compared_with_the_same_ones():
    class Noisy(Network):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    assert output_harm(Noisy(), batches())["little"] < 1e-3


def test_a_distance_of_logits_is_zero_without_a_difference():
    found = output_harm(Network(), batches(), "much|unused", distance=soft_cross_entropy(1.0))
    assert found["much"] > 0.0
    assert "unused" not in found  # a weight of 0 would have it compressed to nothing
    assert "little" not in found


def test_convolutions_and_padding():
    class Masked(Network):
        def forward(self, x, attention_mask):
            return super().forward(x)

    mask = torch.ones(4, 8)
    mask[:, 5:] = 0
    x = torch.randn(4, 8, 16)
    full = output_harm(Masked(), [{"x": x, "attention_mask": mask}], "much")["much"]
    assert full == pytest.approx(1.0, rel=0.3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    assert set(output_harm(model, [torch.randn(4, 3, 8, 8)])) == {"0", "2"}


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="noise must be positive and finite, got 0"):
        output_harm(Network(), batches(), noise=0.0)
    with pytest.raises(ValueError, match="noise in layer 'much', for batch 0"):
        output_harm(Network(), [torch.full((2, 16), torch.inf)])


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_harm_in_half_precision_is_about_that_in_single(dtype, factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    given = batches(2)
    single = output_harm(model, given)
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(factor)
    found = output_harm(model.to(dtype), [batch.to(dtype) for batch in given])
    assert found["2"] == pytest.approx(single["2"], rel=0.8)


def test_harm_of_complex_networks_is_positive():
    model = nn.Sequential(*(nn.Linear(16, 16, dtype=torch.complex64) for _ in range(2)))
    found = output_harm(model, [torch.randn(32, 16, dtype=torch.complex64)])
    assert all(0.5 < harm < 2 for harm in found.values())


def test_harm_of_the_projection_of_attention_is_measured():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    found = output_harm(Attending(), list(torch.randn(2, 3, 5, 16)))
    assert 0.5 < found["attention.out_proj"] < 2


def test_passes_leave_nothing_behind_and_do_not_see_each_other():
    class Remembering(Network):
        def __init__(self):
            super().__init__()
            self.register_buffer("sum", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.sum += 1
            self.last = x
            return self.sum * super().forward(x)

    model = Remembering()
    assert output_harm(model, batches()) == pytest.approx(output_harm(Network(), batches()))
    assert model.sum == 0
    assert model.last is None


def test_noise_that_rounding_would_lose_is_refused():
    with pytest.raises(ValueError, match=r"noise must be at least 1e-07 .* got 1e-12"):
        output_harm(Network(), batches(), noise=1e-12)


def test_a_distance_below_that_without_noise_counts_as_none():
    found = output_harm(Network(), batches(1), distance=lambda a, b: -(a - b).square().mean())
    assert set(found.values()) == {0.0}


def test_noise_is_relative_to_outputs_without_padding():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(20, 16)
            self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
            with torch.no_grad():
                self.embedding.weight[0] = 100

        def forward(self, input_ids, attention_mask):
            return self.head(torch.tanh(self.inner(self.embedding(input_ids))))

    ids = torch.randint(1, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    padding = torch.zeros_like(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {
        "input_ids": torch.cat([ids, padding], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), padding], 1),
    }
    plain, found = (output_harm(Tokens(), [each]) for each in (batch, padded))
    assert found == pytest.approx(plain, rel=0.3)


def test_harm_in_an_encoder_that_drops_padding_itself():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    found = output_harm(model, [{"src": torch.randn(3, 5, 16), "src_key_padding_mask": mask}])
    assert all(harm > 0 for harm in found.values())
