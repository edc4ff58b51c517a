import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact.compare import cut_matrices

RNG = np.random.RandomState(0)
WEIGHTS = {
    "embeddings.word": RNG.standard_normal((100, 40)),
    "layer.0.attention.query": RNG.standard_normal((40, 40)),
    "layer.0.attention.key": RNG.standard_normal((40, 40)),
    "layer.0.mlp.up": RNG.standard_normal((80, 40)),
}


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True),
    per_size=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_window_does_not_depend_on_the_other_sizes_or_the_order_of_layers(sizes, per_size, seed):
    options = {"per_size": per_size, "random_state": seed}
    together = cut_matrices(WEIGHTS, sizes=sizes, **options)
    reordered = dict(reversed(WEIGHTS.items()))
    alone = [cut_matrices(reordered, sizes=[size], **options) for size in sizes]
    assert list(together) == [name for cut in alone for name in cut]
    for cut in alone:
        for name, matrix in cut.items():
            np.testing.assert_array_equal(matrix, together[name])


def test_windows_are_where_their_names_say_and_all_different():
    cut = cut_matrices(WEIGHTS, sizes=[8], per_size=12, dtype=np.float64)
    assert len(cut) == 12
    for name, matrix in cut.items():
        layer, _, where = name.partition("[")
        rows, columns = (slice(*map(int, part.split(":"))) for part in where[:-1].split(", "))
        np.testing.assert_array_equal(matrix, WEIGHTS[layer][rows, columns])


def test_layers_take_turns():
    cut = cut_matrices(WEIGHTS, sizes=[8], per_size=4)
    layers = [name.partition("[")[0] for name in cut]
    assert layers[:2] == layers[2:]
    assert set(layers) == {"layer.0.attention.query", "layer.0.attention.key"}


def test_no_more_windows_are_cut_than_there_are():
    assert len(cut_matrices(WEIGHTS, sizes=[40], per_size=9)) == 2
    assert len(cut_matrices(WEIGHTS, sizes=[39], per_size=9)) == 8


def test_full_adds_whole_matrices_of_the_other_shapes():
    cut = cut_matrices(WEIGHTS, sizes=[40], full=True)
    assert cut["layer.0.mlp.up"].shape == (80, 40)
    assert "embeddings.word" not in cut
    assert "layer.0.attention.key" in cut
    whole = cut_matrices(WEIGHTS, sizes=[8], per_size=1, full=True)
    assert sorted(W.shape for W in whole.values()) == [(8, 8), (40, 40), (80, 40)]


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.none() | st.lists(st.integers(1, 40), min_size=1, max_size=2, unique=True),
    per_size=st.integers(1, 3),
    full=st.booleans(),
    layers=st.sampled_from([None, "attention", "mlp|embed"]),
)
def test_every_layer_is_cut_or_named_with_the_reason(sizes, per_size, full, layers):
    weights = WEIGHTS | {"layer.1.attention.small": np.ones((5, 70)), "head": np.ones((70, 70))}
    sizes = sizes or [40 if layers else 5]
    cut = cut_matrices(weights, sizes=sizes, per_size=per_size, full=full, layers=layers)
    taken = {name.partition("[")[0] for name in cut}
    assert taken | set(cut.left_out) == set(weights)
    assert not taken & set(cut.left_out)
    assert all(cut.left_out.values())


def test_reasons_say_what_to_change():
    weights = WEIGHTS | {"layer.1.attention.small": np.ones((5, 70))}
    reasons = cut_matrices(weights, sizes=[40], per_size=1).left_out
    assert "select it with layers" in reasons["embeddings.word"]
    assert "smaller than the windows" in reasons["layer.1.attention.small"]
    (other,) = (name for name in reasons if "attention" in name and "small" not in name)
    assert "per_size=1 windows of each size were cut from other layers" in reasons[other]
    same = {f"m{i}": np.ones((8, 8)) for i in range(3)}
    reasons = cut_matrices(same, sizes=[4], per_size=1, full=True).left_out
    assert {*reasons.values()} == {"per_size=1 other matrices of shape 8×8 were used"}
    reasons = cut_matrices(weights, sizes=[8], layers="mlp").left_out
    assert "does not match layers='mlp'" in reasons["layer.0.attention.key"]


def test_layers_are_chosen_by_pattern():
    cut = cut_matrices(WEIGHTS, sizes=[8], layers="mlp")
    assert all(name.startswith("layer.0.mlp.up") for name in cut)


def test_without_attention_all_layers_but_embeddings_are_used():
    plain = {"embed": np.ones((70, 70)), "fc": np.zeros((70, 70))}
    cut = cut_matrices(plain)
    assert len(cut) == 4
    assert not any(matrix.any() for matrix in cut.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [41]}, "sizes must not exceed 40.*41"),
        ({"sizes": [0]}, "sizes must be a positive integer, got 0"),
        ({"sizes": [8.5]}, "sizes must be a positive integer, got 8.5"),
        ({"per_size": 0}, "per_size must be a positive integer, got 0"),
        ({"layers": "absent"}, "layers must match .*'absent'.*embeddings.word"),
        ({"layers": "("}, "layers must be a regular expression"),
        ({}, "at most 40"),
    ],
)
def test_options_that_cannot_be_met_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        cut_matrices(WEIGHTS, **options)
