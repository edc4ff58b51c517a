"""Reading and writing single files, against the reference implementation and against damage."""

import json
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact._files import write_atomically
from matfact._safetensors import (
    from_bfloat16,
    in_aligned_order,
    serialize,
    stored,
    to_bfloat16,
)
from matfact._safetensors_file import SafetensorsFile

ARRAYS = {
    "empty": np.zeros((0, 3), np.float32),
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "odd": np.array([1, 2, 3], np.uint8),
    "scalar": np.array(7.5),
    "signed": np.array([[-1, 2]], np.int32),
    "truth": np.array([True, False]),
}


def write(path, arrays, metadata=None):
    tensors = {name: stored(array) for name, array in arrays.items()}
    specs = in_aligned_order({name: spec for name, (spec, _) in tensors.items()})
    write_atomically(path, serialize(specs, (tensors[n][1] for n in specs), metadata or {}))


def with_header(path, header, n_data=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_data))


def test_files_are_those_of_the_reference_implementation(tmp_path):
    write(tmp_path / "ours", ARRAYS, {"format": "np"})
    safetensors.numpy.save_file(ARRAYS, tmp_path / "theirs", metadata={"format": "np"})
    for name in ("ours", "theirs"):
        file = SafetensorsFile(tmp_path / name)
        in_memory = SafetensorsFile(tmp_path / name, in_memory=True)
        theirs = safetensors.numpy.load_file(tmp_path / name)
        assert file.metadata == {"format": "np"}
        assert set(file.specs) == set(theirs) == set(ARRAYS)
        for key, array in ARRAYS.items():
            for found in (file.read(key), in_memory.read(key), theirs[key]):
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array)
            assert b"".join(file.chunks(key)) == array.tobytes()


def test_bfloat16_bits_are_those_of_torch(tmp_path):
    rng = np.random.RandomState(0)
    values = rng.standard_normal(4096).astype(np.float32) * 2.0 ** rng.randint(-130, 127, 4096)
    values[:6] = [0.0, -0.0, np.inf, -np.inf, np.finfo(np.float32).max, 2.0**-149]
    exact = torch.from_numpy(values).to(torch.bfloat16)
    bits = exact.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(values), bits)
    np.testing.assert_array_equal(from_bfloat16(bits), exact.float().numpy())
    assert np.isnan(from_bfloat16(to_bfloat16(np.array([np.nan], np.float32)))).all()
    safetensors.torch.save_file({"w": exact}, tmp_path / "m")
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "m").read("w"), exact.float().numpy())


def entry(begin, end, shape=(4,), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE = {
    "offsets overlap": {"a": entry(0, 4), "b": entry(2, 6), "c": entry(6, 8, (2,))},
    "offsets leave a gap": {"a": entry(0, 4), "b": entry(5, 8, (3,))},
    "offsets beyond the end": {"a": entry(0, 400, (400,))},
    "offsets before the start": {"a": entry(-4, 4, (8,))},
    "offsets backwards": {"a": entry(8, 0, (8,))},
    "offsets of floats": {"a": entry(0.0, 8.0, (8,))},
    "bytes left over": {"a": entry(0, 4)},
    "shape unlike offsets": {"a": entry(0, 8, (9,))},
    "absurd shape": {"a": entry(0, 8, (1 << 40, 1 << 40), "F64")},
    "shape that wraps to 8": {"a": entry(0, 8, ((1 << 61) + 1,), "F64")},
    "negative sizes": {"a": entry(0, 8, (-2, -4))},
    "sizes of booleans": {"a": entry(0, 8, (True, 8))},
    "a hundred dimensions": {"a": entry(0, 8, (8, *[1] * 99))},
    "unknown dtype": {"a": entry(0, 8, (1,), "X64")},
    "dtype of another type": {"a": entry(0, 8, (1,), ["F64"])},
    "incomplete entry": {"a": {"dtype": "U8", "shape": [8]}},
    "entry of another type": {"a": 8},
    "a list": [entry(0, 8, (8,))],
    "metadata of another type": {"__metadata__": {"x": 1}, "a": entry(0, 8, (8,))},
    "a name twice": b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
    b'"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "a number that is none": b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8],"x":NaN}}',
    "a number beyond all": b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8],"x":1e999}}',
    "a size of one and one of true": {"a": entry(0, 4, (1, 4)), "b": entry(4, 8, (True, 4))},
    "no JSON": b"{'a': 1}",
    "no UTF-8": b'{"\xff": 1}',
    "nested deeply": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of many digits": b'{"a":' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_headers_that_lie_are_refused(case, tmp_path):
    path = tmp_path / "hostile.safetensors"
    with_header(path, HOSTILE[case], n_data=8)
    with pytest.raises(ValueError, match=r"path must name .*hostile\.safetensors"):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 100, 100_000_001])
def test_a_header_longer_than_the_file_or_the_limit_is_not_read(length, tmp_path):
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(length + 8 if 100 < length < 1 << 30 else 50)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="path must name"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_truncated_file_is_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "m"
    write(path, ARRAYS)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="path must name"):
        SafetensorsFile(path)


def test_a_file_cut_after_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "m"
    write(path, {"w": np.ones(100)})
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    for read in (file.read, lambda name: list(file.chunks(name))):
        with pytest.raises(ValueError, match=r"must stay as it is.*'w'"):
            read("w")


def test_dtypes_without_a_counterpart_are_refused_by_name(tmp_path):
    path = tmp_path / "m"
    with_header(path, {"w": entry(0, 4, dtype="F8_E4M3")}, n_data=4)
    with pytest.raises(ValueError, match="F8_E4M3"):
        SafetensorsFile(path).read("w")
    with pytest.raises(ValueError, match="complex128"):
        stored(np.zeros(2, np.complex128))


@pytest.mark.parametrize("shift", range(4))  # the address of the file's first byte
def test_values_are_aligned_wherever_a_file_lies_in_memory(shift):
    # Unaligned ones take other kernels, whose sums differ in the last bits.
    values = np.arange(5.0, dtype=np.float32)
    content = bytes(shift) + safetensors.numpy.save({"values": values})
    read = SafetensorsFile.of_bytes(np.frombuffer(content, np.uint8)[shift:], "it").read("values")
    assert read.flags.aligned
    np.testing.assert_array_equal(read, values)
