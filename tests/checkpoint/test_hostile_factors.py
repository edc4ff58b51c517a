"""Files of factors with valid checksums and inconsistent contents."""

import json
import os
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfact._files import write_atomically
from matfact._safetensors import TensorSpec, serialize, stored
from matfact.checkpoint import Checkpoint, decompress, save
from matfact.checkpoint._manifest import Manifest, StoredTensor
from matfact.checkpoint._shards import write_shard
from matfact.operators import BlockSparseFactor, DenseFactor, FactorProduct, SparseFactor
from matfact.operators._encoding import _overlap


def content(factors, tensors, version=2):
    entries = [{"complex": False} | factor for factor in factors]
    manifest = {"format": "matfact", "version": version, "factors": entries}
    held = {name: stored(np.asarray(array)) for name, array in tensors.items()}
    specs = {name: spec for name, (spec, _) in held.items()}
    data = [data for _, data in held.values()]
    return list(serialize(specs, data, {"matfact": json.dumps(manifest)}))


def factor(kind, shape, values, **positions):
    """Return a file of one factor with the given tensors."""
    tensors = {"values": np.asarray(values, np.float32), **positions}
    named = {f"0.{name}": array for name, array in tensors.items()}
    return content([{"kind": kind, "shape": shape}], named)


def quantized(kind="dense", shape=(2, 3), fields=(), **changes):
    """Return a file of one factor with quantized values: by default 2×3 values of 2 bits."""
    described = {"bits": 2, "group_size": None, "unit": 0, "dtype": "F32", "shape": [2, 3]}
    described |= dict(fields)
    tensors = {
        "values": U8([0b00011011, 0b11000000]),
        "levels": np.int8([-3, -1, 1, 3]),
        "scales": np.float16([1, 2]),
    }
    tensors = {f"0.{k}": v for k, v in (tensors | changes).items() if v is not None}
    return content([{"kind": kind, "shape": list(shape), "quantized": described}], tensors)


def deflated(data, *, references=False, cut=0, more=b""):
    strategy = zlib.Z_DEFAULT_STRATEGY if references else zlib.Z_HUFFMAN_ONLY
    coder = zlib.compressobj(9, wbits=-15, strategy=strategy)
    coded = coder.compress(bytes(data)) + coder.flush()
    return np.frombuffer(coded[: len(coded) - cut] + more, np.uint8)


U8, U16, I32 = np.uint8, np.uint16, np.int32
MASK, GAPS = U8([0b10100000]), U8([0, 1])  # of 1×8: places 0 and 2
HUGE = 1 << 62
LIES = {
    "an unknown storage": factor("pickle", [1, 1], [1]),
    "a storage of another type": factor(["dense"], [1, 1], [1]),
    "dense values of another shape": factor("dense", [2, 2], [1, 2, 3, 4]),
    "dense values of another size": factor("dense", [2, 3], np.ones((2, 2))),
    "a side of 2⁶¹": factor("csr", [1, 1 << 61], [], indptr=U16([0, 0]), indices=U16([])),
    "a side of 2²⁵": factor("selection", [1, 1 << 25], [], index=U16([0])),
    "a shape of three": factor("dense", [1, 1, 1], [1]),
    "a mask too short": factor("bitmask", [4, 4], [1], mask=U8([128])),
    "a mask with more bits": factor("bitmask", [2, 4], [1], mask=U8([255])),
    "a mask with bits after the end": factor("bitmask", [1, 4], [1], mask=U8([1])),
    "a mask of another dtype": factor("bitmask", [1, 4], [1], mask=U16([128])),
    "no mask": factor("bitmask", [1, 4], [1]),
    "more than a mask": factor("bitmask", [1, 4], [1], mask=U8([128]), index=U8([1])),
    "columns outside": factor("csr", [1, 4], [1], indptr=U16([0, 1]), indices=U16([4])),
    "columns before": factor("csr", [1, 4], [1], indptr=U16([0, 1]), indices=I32([-1])),
    "a place twice": factor("csr", [1, 4], [1, 2], indptr=U16([0, 2]), indices=U16([1, 1])),
    "rows that go back": factor("csr", [2, 4], [1], indptr=U16([0, 2, 1]), indices=U16([0])),
    "rows beyond the end": factor("csr", [1, 4], [1], indptr=U16([0, 9]), indices=U16([0])),
    "columns of floats": factor("csr", [1, 4], [1], indptr=U16([0, 1]), indices=np.ones(1)),
    "kronecker values of another rank": factor("kronecker", [2, 2], np.ones((2, 2))),
    "kronecker values of another shape": factor("kronecker", [9, 9], np.ones((2, 2, 2, 2))),
    "blocks outside": factor("blocks", [4, 4], np.ones(4), blocks=U16([[3, 5, 0, 2]])),
    "blocks inside out": factor("blocks", [4, 4], np.ones(4), blocks=U16([[2, 0, 2, 0]])),
    "blocks of other size": factor("blocks", [4, 4], np.ones(3), blocks=U16([[0, 2, 0, 2]])),
    "blocks that overlap": factor(
        "blocks", [4, 4], np.ones(5), blocks=U16([[0, 2, 0, 2], [1, 2, 1, 2]])
    ),
    "blocks that overlap later": factor(
        "blocks", [9, 9], np.ones(17), blocks=U16([[0, 4, 4, 8], [4, 9, 0, 0], [3, 4, 7, 8]])
    ),
    "a block twice": factor("blocks", [4, 4], np.ones(2), blocks=U16([[3, 4, 3, 4], [3, 4, 3, 4]])),
    "blocks without end": factor("blocks", [4, 4], [], blocks=np.array([[-HUGE, HUGE, 0, 4]])),
    "a selection outside": factor("selection", [1, 4], [], index=U16([4])),
    "a selection before": factor("selection", [1, 4], [], index=I32([-2])),
    "a selection twice": factor("selection", [2, 4], [], index=U16([1, 1])),
    "a selection with values": factor("selection", [1, 4], [1], index=U16([1])),
    "values of integers": content([{"kind": "dense", "shape": [1, 1]}], {"0.values": [[1]]}),
    "complex values that are not pairs": content(
        [{"kind": "dense", "shape": [1, 1], "complex": True}], {"0.values": [[1.0]]}
    ),
    "complex that is not true or false": content(
        [{"kind": "dense", "shape": [1, 1], "complex": 0}], {"0.values": [[1.0]]}
    ),
    "a version that is true": content([], {}, version=True),
    "no shape": content([{"kind": "dense"}], {"0.values": [[1.0]]}),
    "no values": content([{"kind": "dense", "shape": [1, 1]}], {}),
    "no factor": content([], {}),
    "a tensor of no factor": content([], {"0.values": [[1.0]]}),
    "factors that do not chain": content(
        [{"kind": "dense", "shape": [1, 1]}, {"kind": "dense", "shape": [2, 1]}],
        {"0.values": np.ones((1, 1)), "1.values": np.ones((2, 1))},
    ),
    "a short way through a long vector": content(
        [
            {"kind": "csr", "shape": [4, 1 << 24]},
            {"kind": "dense", "shape": [1 << 24, 0]},
            {"kind": "dense", "shape": [0, 4]},
        ],
        {
            "0.values": np.ones(0),
            "0.indptr": U16([0, 0, 0, 0, 0]),
            "0.indices": U16([]),
            "1.values": np.ones((1 << 24, 0)),
            "2.values": np.ones((0, 4)),
        },
    ),
    "another version": content([], {}, version=3),
}


QUANTIZED_LIES = {
    "levels that do not increase": quantized(levels=np.int8([-3, 1, -1, 3])),
    "a level twice": quantized(levels=np.int8([-3, 1, 1, 3])),
    "levels of another dtype": quantized(levels=I32([-3, -1, 1, 3])),
    "a matrix of levels": quantized(levels=np.int8([[-3, -1], [1, 3]])),
    "a level too low": quantized(levels=np.int8([-128, -1, 1, 3])),
    "more levels than codes": quantized(levels=np.arange(5, dtype=np.int8)),
    "codes beyond the levels": quantized(levels=np.int8([-3, -1, 1])),
    "no levels": quantized(levels=None),
    "levels that are none": quantized(levels=np.int8([])),
    "no scales": quantized(scales=None),
    "an infinite scale": quantized(scales=np.float16([np.inf, 1])),
    "a scale that is no number": quantized(scales=np.float32([np.nan, 1])),
    "a unit that makes scales infinite": quantized(fields={"unit": 128}),
    "a unit without measure": quantized(fields={"unit": HUGE}),
    "a unit that is true": quantized(fields={"unit": True}),
    "scales of integers": quantized(scales=I32([1, 2])),
    "too few scales": quantized(scales=np.float16([1])),
    "too many scales": quantized(scales=np.float16([1, 2, 3])),
    "a matrix of scales": quantized(scales=np.float16([[1, 2]])),
    "codes of 1 bit": quantized(fields={"bits": 1}),
    "codes of 9 bits": quantized(fields={"bits": 9}),
    "codes of 2.0 bits": quantized(fields={"bits": 2.0}),
    "codes of true bits": quantized(fields={"bits": True}),
    "bits after the last code": quantized(values=U8([0, 1])),
    "codes too few": quantized(values=U8([0])),
    "codes too many": quantized(values=U8([0, 0, 0])),
    "codes of another dtype": quantized(values=U16([0, 0])),
    "no codes": quantized(values=None),
    "groups of nothing": quantized(fields={"group_size": 0}),
    "groups of less": quantized(fields={"group_size": -1}),
    "groups without measure": quantized(fields={"group_size": HUGE - 1}),
    "groups of halves": quantized(fields={"group_size": 0.5}),
    "values without end": quantized(fields={"shape": [HUGE - 1, HUGE - 1]}),
    "values of a size below zero": quantized(fields={"shape": [-2, -3]}),
    "values of another shape": quantized(fields={"shape": [3, 2]}),
    "values in many dimensions": quantized(fields={"shape": [2, 3, 1, 1, 1]}),
    "values without a shape": quantized(fields={"shape": None}),
    "values of no dtype": quantized(fields={"dtype": ["F32"]}),
    "values of whole numbers": quantized(fields={"dtype": "I8"}),
    "rows of nothing without number": quantized(
        shape=(1 << 24, 0), fields={"shape": [1 << 24, 0]}, values=U8([]), scales=np.ones(1)
    ),
    "quantized as a list": content([{"kind": "dense", "shape": [2, 3], "quantized": [2]}], {}),
    "complex codes": content(
        [{"kind": "dense", "shape": [2, 3], "quantized": {}, "complex": True}], {}
    ),
    "a quantized selection": quantized("selection", index=U16([0, 1])),
    "quantized signs": quantized("sign", signs=U8([0])),
    "a matrix of scattered values": quantized("bitmask", mask=U8([255])),
}
LIES |= QUANTIZED_LIES | {
    "signs too few": factor("sign", [3, 3], [], signs=U8([1])),
    "signs after the end": factor("sign", [1, 7], [], signs=U8([1])),
    "signs of another dtype": factor("sign", [1, 8], [], signs=U16([1])),
    "signs with values": factor("sign", [1, 8], [1], signs=U8([1])),
    "no signs": factor("sign", [1, 8], []),
    "a mask and its code": factor("bitmask", [1, 8], [1, 2], mask=MASK, coded=deflated(MASK)),
    "a coded mask that is cut": factor("bitmask", [1, 8], [1, 2], coded=deflated(MASK, cut=1)),
    "bytes after a coded mask": factor("bitmask", [1, 8], [1, 2], coded=deflated(MASK, more=b"\0")),
    "a coded mask that is longer": factor("bitmask", [1, 8], [1, 2], coded=deflated([160, 0])),
    "a coded mask that is shorter": factor("bitmask", [1, 9], [1, 2], coded=deflated(MASK)),
    "a coded mask with bits after the end": factor("bitmask", [1, 4], [1], coded=deflated([129])),
    "a coded mask with more bits": factor("bitmask", [1, 8], [1], coded=deflated(MASK)),
    "a code of another dtype": factor("bitmask", [1, 8], [1, 2], coded=U16([3, 0])),
    "a matrix of codes": factor("bitmask", [1, 8], [1, 2], coded=deflated(MASK)[None]),
    "an empty code": factor("bitmask", [0, 8], [], coded=U8([])),
    "a code that is none": factor("bitmask", [1, 8], [1, 2], coded=U8([255, 255, 255])),
    "a mask that is a bomb": factor(
        "bitmask", [1 << 13, 1 << 13], [], coded=deflated(bytes(1 << 23), references=True)
    ),
    "a mask that a code cannot hold": factor(
        "bitmask", [1, 1 << 24], [], coded=deflated(bytes(1 << 10))
    ),
    "gaps that are a bomb": factor(
        "gaps", [1 << 20, 1 << 20], [], coded=deflated(b"\xff" * (1 << 24), references=True)
    ),
    "gaps that lead beyond": factor("gaps", [1, 2], [1, 2], coded=deflated(GAPS)),
    "gaps that go on": factor("gaps", [9, 99], [1, 2], coded=deflated([0, 1, 255])),
    "gaps of more values": factor("gaps", [1, 8], [1], coded=deflated(GAPS)),
    "gaps of fewer values": factor("gaps", [1, 8], [1, 2, 3], coded=deflated(GAPS)),
    "gaps in no column": factor("gaps", [8, 0], [1, 2], coded=deflated(GAPS)),
    "gaps that are cut": factor("gaps", [1, 8], [1, 2], coded=deflated(GAPS, cut=1)),
    "bytes after gaps": factor("gaps", [1, 8], [1, 2], coded=deflated(GAPS, more=b"\0")),
    "rows of gaps without number": factor("gaps", [1 << 24, 8], [1, 2], coded=deflated(GAPS)),
    "a matrix of values between gaps": factor("gaps", [1, 8], [[1, 2]], coded=deflated(GAPS)),
    "no gaps": factor("gaps", [1, 8], [1, 2]),
}


def test_what_is_changed_to_lie_is_true_before(tmp_path):
    honest = [
        (quantized(), [[-3, -1, 1], [6, 6, -6]]),
        (factor("bitmask", [1, 8], [1, 2], coded=deflated(MASK)), [[1, 0, 2, 0, 0, 0, 0, 0]]),
        (factor("gaps", [2, 8], [1, 2], coded=deflated(GAPS)), [[1, 0, 2] + [0] * 5, [0] * 8]),
        (factor("sign", [1, 7], [], signs=U8([0b10100000])), [[1, -1, 1, -1, -1, -1, -1]]),
    ]
    for chunks, expected in honest:
        write_atomically(tmp_path / "p.safetensors", chunks)
        np.testing.assert_array_equal(FactorProduct.load(tmp_path / "p.safetensors"), expected)


@pytest.mark.parametrize("case", LIES)
def test_files_of_factors_that_lie_are_refused(case, tmp_path):
    path = tmp_path / "product.safetensors"
    write_atomically(path, LIES[case])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"path must name|factors must"):
            FactorProduct.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


def test_blocks_that_only_touch_are_read(tmp_path):
    arrays = [np.full((2, 3), value) for value in (1.0, 2.0, 3.0)]
    corners = [(0, 0), (0, 3), (2, 1)]
    touching = BlockSparseFactor.from_blocks(arrays, corners, (4, 6), like=arrays[0])
    FactorProduct([touching]).save(tmp_path / "p.safetensors")
    loaded = FactorProduct.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(loaded.toarray(), touching.toarray())


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_blocks_overlap_where_an_entry_would_be_written_twice(data):
    span = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted)
    drawn = data.draw(st.lists(st.tuples(span, span), max_size=5))
    blocks = np.array([[*rows, *columns] for rows, columns in drawn], np.int64).reshape(-1, 4)
    written = np.zeros((5, 5), int)
    for r0, r1, c0, c1 in blocks:
        written[r0:r1, c0:c1] += 1
    assert _overlap(blocks) == bool((written > 1).any())


def bomb(folder, shape, product):
    """Write a checkpoint of one product that claims `shape`."""
    folder.mkdir()
    entries, data = [], {}
    for i, (kind, sides, tensors) in enumerate(product):
        entries.append({"kind": kind, "shape": sides})
        data |= {f"{i}.{name}": array for name, array in tensors.items()}
    kinds = tuple(entry["kind"] for entry in entries)
    tensor = StoredTensor("w", TensorSpec("F32", shape), kinds)
    shard = write_shard(folder / "00001.safetensors", content(entries, data), [tensor])
    Manifest((shard,), {}, {}).write(folder)


def empty_csr(rows, columns):
    positions = {"indptr": np.zeros(rows + 1, U16), "indices": U16([])}
    return ("csr", [rows, columns], {"values": np.zeros(0, np.float32), **positions})


def test_a_few_bytes_that_claim_to_be_a_petabyte_are_refused(tmp_path):
    side = 1 << 24
    thin = ("dense", [side, 1], {"values": np.zeros((side, 1), np.float16)})
    bomb(tmp_path / "bomb", (side, side), [thin, empty_csr(1, side)])
    with pytest.raises(ValueError, match="are free"):
        decompress(tmp_path / "bomb", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["bomb"]


def test_rows_are_decompressed_a_few_at_a_time(tmp_path):
    rows, columns = 64, 1 << 18
    bomb(tmp_path / "bomb", (rows, columns), [empty_csr(rows, columns)])
    # What is loaded first takes memory of its own.
    decompress(tmp_path / "bomb", tmp_path / "out")
    tracemalloc.start()
    try:
        decompress(tmp_path / "bomb", tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out").stat().st_size > 4 * rows * columns
    assert peak < 2 * 4 * rows * columns


def test_a_checkpoint_of_large_factors_is_read_one_at_a_time(tmp_path):
    layer = FactorProduct([DenseFactor(np.ones((256, 256), np.float32))])
    save(tmp_path / "network", {f"w{i}": layer for i in range(20)})
    one = 4 * 256 * 256
    tracemalloc.start()
    try:
        loaded = Checkpoint(tmp_path / "network")
        loaded.verify()
        assert all(loaded[name].shape == (256, 256) for name in loaded)
        assert tracemalloc.get_traced_memory()[1] < 4 * one
    finally:
        tracemalloc.stop()


def test_values_in_an_order_of_their_own_keep_it(tmp_path):
    scrambled = SparseFactor(np.float32([2, 1]), I32([3, 0]), np.array([0, 2]), 4)
    save(tmp_path / "network", {"w": FactorProduct([scrambled])})
    loaded = Checkpoint(tmp_path / "network")
    assert loaded.tensors["w"].storage == ("csr",)
    np.testing.assert_array_equal(loaded["w"].toarray(), [[1, 0, 0, 2]])
