"""Torch files with shared objects: cost is bounded by the stored size."""

import collections
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from matfact.compare import load_weights

W = torch.arange(24.0).reshape(6, 4)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(request, tmp_path):
    def save(content):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=request.param)
        return tmp_path / "m.pt"

    return save


def nested(depth, key="a"):
    content = {"fc.weight": W}
    for _ in range(depth):
        content = {key: content}
    return content


def doubled(depth):
    content = {"fc.weight": W}
    for _ in range(depth):
        content = {"a": content, "b": content}
    return content


EXPANDING = {
    "one number, many times": lambda: W[:1, :1].expand(20_000, 20_000),
    "one row, many times": lambda: W[:1].expand(10**7, 4),
    "rows that overlap": lambda: torch.ones(40_000).as_strided((20_000, 20_000), (1, 1)),
    "half precision": lambda: torch.ones(1, 1, dtype=torch.bfloat16).expand(20_000, 20_000),
}


@pytest.mark.parametrize("case", EXPANDING)
def test_tensors_that_expand_are_refused(case, saved):
    path = saved({"fc.weight": EXPANDING[case](), "other.weight": W})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="would expand to"):
            load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def test_many_different_views_of_few_numbers_are_refused(saved):
    numbers = torch.ones(100_000)
    views = {f"{i}.weight": numbers[i : i + 90_000].reshape(300, 300) for i in range(100)}
    with pytest.raises(ValueError, match="would expand to"):
        load_weights(saved(views))


def test_a_container_is_visited_once(saved):
    loaded = load_weights(saved(doubled(40)))
    assert list(loaded) == ["a." * 40 + "fc"]
    np.testing.assert_array_equal(next(iter(loaded.values())), W)


def test_a_container_that_holds_itself_is_read(saved):
    content = {"fc.weight": W}
    content["itself"] = content
    assert list(load_weights(saved(content))) == ["fc"]


def test_weights_that_layers_share_are_read_under_each_name_and_held_once(saved):
    large = torch.randn(2000, 300, dtype=torch.float64)
    state = collections.OrderedDict((f"{i}.weight", large) for i in range(30))
    loaded = load_weights(saved(state))
    assert len(loaded) == 30
    assert all(np.shares_memory(array, loaded["0"]) for array in loaded.values())


@pytest.mark.parametrize(
    "content",
    [nested(70), nested(3, key="k" * 999), {"k" * 1001: W}, {"x": bytearray(9), "fc.weight": W}],
    ids=["depth", "names together", "one name", "memory by itself"],
)
def test_what_no_state_dict_holds_is_refused(content, saved):
    with pytest.raises(ValueError, match=r"nested|more than tensors"):
        load_weights(saved(content))


def test_keys_that_are_no_names_are_left_out(saved):
    assert list(load_weights(saved({("x", "y"): W, 3: {"weight": W}}))) == ["3"]


@pytest.mark.parametrize("is_zip", [True, False])
def test_codecs_that_double_their_input_are_not_run(is_zip, tmp_path):
    text = b"\x80\x02](c_codecs\nencode\nq\x00h\x00" + _text("a" * 64) + _text("latin1")
    text += b"\x86Rq\x01" + (b"h\x00h\x01" + _text("hex") + b"\x86Rq\x01") * 20 + b"e."
    path = tmp_path / "m.pt"
    if is_zip:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", text)
            archive.writestr("m/version", "3\n")
            archive.writestr("m/byteorder", "little")
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        whole = path.read_bytes()
        path.write_bytes(whole.replace(pickle.dumps({}, 2), text))
        assert path.read_bytes() != whole
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than tensors"):
            load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def _text(string):
    """Return how a pickle holds a string."""
    return b"X" + len(string).to_bytes(4, "little") + string.encode()
