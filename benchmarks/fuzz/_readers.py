"""File readers, with valid files for each."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz._damage import (
    Files,
    damaged_arguments,
    damaged_checkpoint,
    damaged_gguf,
    damaged_index,
    damaged_json,
    damaged_masks,
    damaged_record,
    damaged_safetensors,
    damaged_zip,
    flipped,
    one,
    or_special,
)
from benchmarks.fuzz._graphs import damaged_graph


@dataclasses.dataclass(frozen=True)
class Reader:
    """A file reader.

    Attributes
    ----------
    seeds : list of dict of str to bytes
        Valid files.
    damage : callable
        Damages one of them.
    read : callable
        Reads everything in a folder with the file.
    works : bool
        Whether it also does work, which takes time and memory; it then gets a tenth as many files.
    """

    seeds: list[Files]
    damage: Callable[[random.Random, Files], Files]
    read: Callable[[Path], object]
    works: bool = False


def readers() -> dict[str, Reader]:
    """Return all readers by name; that of torch only if it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        found = _readers(Path(folder))
    return found


def _readers(folder: Path) -> dict[str, Reader]:
    from matfact import MagnitudePruner, checkpoint
    from matfact.operators import FactorProduct

    weights = _seed_weights()
    plain = [_written(folder, "m.safetensors", _save_safetensors, weights)]
    archives = [
        _written(folder, "m.npz", save, weights)
        for save in (lambda p, w: np.savez(p, **w), lambda p, w: np.savez_compressed(p, **w))
    ]
    arrays = [
        _written(folder, "m.npy", np.save, W) for W in weights.values() if W.ndim > 1 and W.size
    ]
    products = _seed_products()
    factors = [_written(folder, "m.safetensors", lambda p, f: f.save(p), f) for f in products]
    checkpoint.save(folder / "network", dict(enumerate_names(products)) | weights)
    network = [{p.name: p.read_bytes() for p in (folder / "network").iterdir()}]
    begun = plain[0] | _begun(folder, plain[0]["m.safetensors"])
    index = {"weight_map": dict.fromkeys(weights, "m.safetensors")}
    indexed = plain[0] | {"model.safetensors.index.json": json.dumps(index).encode()}
    arguments = [
        ["compress", "m.safetensors", "out", "--density", "0.5", "--method", "magnitude"],
        ["compare", "m.safetensors", "--density", "0.25", "--sizes", "8", "--methods", "magnitude",
         "--jobs", "1", "--output", "out"],
        ["convert", "m.safetensors", "out"],
        ["convert", "m.safetensors", "dense", "--to", "dense"],
        ["inspect", "out", "--json"],
        ["decompress", "out", "dense.safetensors"],
    ]  # fmt: skip
    commands = [plain[0] | {"arguments": json.dumps(words).encode()} for words in arguments]
    pruner = MagnitudePruner(density=0.5)
    found = {
        "safetensors": Reader(plain, one(damaged_safetensors), _read_safetensors),
        "npz": Reader(archives, one(damaged_zip), _read_weights),
        "npy": Reader(arrays, one(flipped), _read_weights),
        "factors": Reader(
            factors, one(damaged_safetensors), lambda f: FactorProduct.load(f / "m.safetensors")
        ),
        "checkpoint": Reader(network, damaged_checkpoint, _read_checkpoint),
        "record": Reader(
            [begun],
            damaged_record,
            lambda f: checkpoint.compress(f / "m.safetensors", f / "out", pruner),
            works=True,
        ),
        "index": Reader([indexed], damaged_index, _read_index),
        "masks": Reader(_masked(folder), damaged_masks, _read_index),
        "arguments": Reader(commands, damaged_arguments, _run_command, works=True),
    }
    found |= _gguf_readers(folder, weights) | _torch_readers(folder, weights)
    return {n: dataclasses.replace(r, damage=or_special(r.damage)) for n, r in found.items()}


def enumerate_names(products: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield names for products."""
    for i, product in enumerate(products):
        yield f"product.{i}.weight", product


def _seed_weights() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(0)
    return {
        "fc.weight": rng.standard_normal((12, 8)).astype(np.float32),
        "conv.weight": rng.standard_normal((4, 3, 3, 3)).astype(np.float16),
        "fc.bias": np.zeros(12),
        "steps": np.arange(3),
        "empty": np.zeros((0, 3), np.float32),
    }


def _seed_products() -> list[Any]:
    """Return a product of each storage, with floating point values and with quantized ones."""
    from matfact import operators as ops
    from matfact.operators._quantized import group_bounds

    rng = np.random.RandomState(0)
    dense = np.where(rng.random_sample((12, 9)) < 0.5, rng.standard_normal((12, 9)), 0)
    thin = np.where(rng.random_sample((4, 500)) < 0.01, 1.0, 0)
    wide = np.where(rng.random_sample((40, 50)) < 0.7, 1.0, 0)
    blocks = [np.ones((3, 4)), np.ones((2, 5))]
    factors: list[list[ops.Factor]] = [
        [ops.SparseFactor.from_dense(dense.astype(np.float32))],
        [ops.SparseFactor.from_dense(thin)],
        [ops.SparseFactor.from_dense(wide)],
        [ops.SparseFactor(np.ones(2), np.int32([3, 0]), np.array([0, 2]), 4)],
        [ops.DenseFactor(np.ones((6, 2))), ops.DenseFactor(np.ones((2, 5)) * 1j)],
        [ops.KroneckerSparseFactor(np.ones((2, 3, 2, 4), np.float16))],
        [ops.BlockSparseFactor.from_blocks(blocks, [(0, 0), (3, 5)], (8, 12), like=blocks[0])],
        [ops.SelectionFactor.from_index([5, -1, 0, 2], 7, like=np.zeros(0))],
    ]
    for bits, (pattern, *_) in enumerate(factors[:-1], start=2):
        values = rng.randint(-1, 2, pattern.values.shape).astype(np.int8)
        group_size = [None, 4, 64][bits % 3]
        scales = np.ones(len(group_bounds(pattern, group_size)) - 1, np.float32)
        factors.append([ops.QuantizedFactor(values, scales, bits, group_size, pattern)])
    factors.append([ops.SignFactor.from_dense(dense)])
    return [ops.FactorProduct(list(chain)) for chain in factors]


def _written(folder: Path, name: str, save: Callable[[Path, Any], object], content: Any) -> Files:
    save(folder / name, content)
    return {name: (folder / name).read_bytes()}


def _save_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    from matfact._files import write_atomically
    from matfact._safetensors import serialize, stored

    half = {"half.weight": stored(np.ones((6, 6), np.float32), "BF16")}
    held = {name: stored(array) for name, array in weights.items()} | half
    specs = {name: spec for name, (spec, _) in held.items()}
    write_atomically(path, serialize(specs, (data for _, data in held.values()), {"format": "pt"}))


def _masked(folder: Path) -> list[Files]:
    """Return weights stored with bitmasks, in all formats, with the configuration of one."""
    rng = np.random.RandomState(0)
    parts: dict[str, np.ndarray] = {"fc.bias": np.zeros(12, np.float32)}
    half = np.tile([0.0, 1.0, 0.0, 2.0], (12, 3)).astype(np.float16)
    for name, W in (("fc", rng.randint(-1, 2, (12, 9)).astype(np.float32)), ("pairs", half)):
        bits, counts = np.packbits(W != 0, axis=-1, bitorder="little"), (W != 0).sum(axis=1)
        parts |= {f"{name}.compressed": W[W != 0], f"{name}.bitmask": bits}
        parts[f"{name}.shape"] = np.array(W.shape)
        if name == "fc":
            parts["fc.row_offsets"] = np.cumsum(counts) - counts
    parts["pairs.shape"] = parts["pairs.shape"].reshape(2, 1)
    parts["pairs.compressed"] = parts["pairs.compressed"].reshape(12, 6)
    config = {"quantization_config": {"sparsity_config": {"format": "sparse-bitmask"}}}
    early = {
        name.replace("fc.", "fc.weight."): W for name, W in parts.items() if "pairs" not in name
    }
    files = [_written(folder, "model.safetensors", _save_safetensors, w) for w in (parts, early)]
    return [held | {"config.json": json.dumps(config).encode()} for held in files]


def _gguf_readers(folder: Path, weights: dict[str, np.ndarray]) -> dict[str, Reader]:
    try:
        import gguf
    except ImportError:
        return {}

    def save(path: Path, weights: dict[str, np.ndarray]) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_array("tokens", ["a", "bc"] * 9)
        writer.add_array("scores", [1.0, 2.0])
        for name in ("Q4_0", "Q8_0", "Q4_K", "IQ2_XS", "TQ1_0", "BF16"):
            kind = gguf.GGMLQuantizationType[name]
            size = gguf.GGML_QUANT_SIZES[kind][1] * (8 if name == "BF16" else 1)
            writer.add_tensor(f"{name}.weight", np.ones((4, size), np.uint8), raw_dtype=kind)
        for name, W in weights.items():
            if W.size:
                writer.add_tensor(name, W)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    seeds = [_written(folder, "m.gguf", save, weights)]
    return {"gguf": Reader(seeds, one(damaged_gguf), _read_gguf)}


def _read_gguf(folder: Path) -> None:
    from matfact.checkpoint._source import Source

    source = Source(folder / "m.gguf")
    source.digests()
    for name in source.specs:
        collections.deque(source.location(name).chunks(), maxlen=0)
        source.location(name).read()
    _read_weights(folder)


def _begun(folder: Path, source: bytes) -> Files:
    """Return interrupted work on `source`."""
    from matfact import MagnitudePruner, checkpoint

    def stop(shard: Any, total: int) -> None:
        seen.append(shard)
        if len(seen) == 2:
            raise KeyboardInterrupt

    seen: list[Any] = []
    place = folder / "begun"
    place.mkdir()
    (place / "m.safetensors").write_bytes(source)
    with contextlib.suppress(KeyboardInterrupt):
        checkpoint.compress(
            place / "m.safetensors", place / "out", MagnitudePruner(density=0.5), progress=stop
        )
    return {f"out/{path.name}": path.read_bytes() for path in (place / "out").iterdir()}


def _torch_readers(folder: Path, weights: dict[str, np.ndarray]) -> dict[str, Reader]:
    try:
        import torch
    except ImportError:
        return {}
    state = {name: torch.asarray(array) for name, array in weights.items()}
    state["half.weight"] = torch.ones(4, 4, dtype=torch.bfloat16)
    seeds = [
        _written(folder, "m.pt", lambda p, s: torch.save({"model": s}, p), state),
        _written(
            folder,
            "m.bin",
            lambda p, s: torch.save(s, p, _use_new_zipfile_serialization=False),
            state,
        ),
    ]

    def damage(rng: random.Random, files: Files) -> Files:
        return one(damaged_zip if "m.pt" in files else flipped)(rng, files)

    return {
        "torch": Reader(seeds, damage, _read_weights),
        "graphs": Reader(seeds[:1], damaged_graph, _read_weights),
        "loading": _network_reader(folder, torch),
        "reports": _report_reader(folder),
    }


def _network_reader(folder: Path, torch: Any) -> Reader:
    """Return the reader of networks, with a tied embedding and a convolution."""
    from matfact import LowRank
    from matfact.torch import compress, load_network, save_network

    nn = torch.nn

    def build() -> Any:
        layers = [nn.Embedding(9, 8), nn.Linear(8, 12), nn.Conv1d(4, 4, 3, groups=2)]
        layers += [nn.BatchNorm1d(4), nn.Linear(8, 9, bias=False)]
        network = nn.Sequential(*layers)
        network[4].weight = network[0].weight
        return network

    network, _ = compress(build(), LowRank(rank=1), layers=["1", "2"])
    save_network(network, folder / "loading")
    seed = {path.name: path.read_bytes() for path in (folder / "loading").iterdir()}
    kept = build()

    def read(place: Path) -> None:
        load_network(build, place)
        load_network(kept, place, strict=False)

    return Reader([seed], damaged_checkpoint, read)


def _report_reader(folder: Path) -> Reader:
    """Return the reader of reports."""
    from torch import nn

    from matfact import MagnitudePruner, compare_projections
    from matfact.compare import Comparison
    from matfact.torch import CompressionReport, compress

    kinds = {"study.json": Comparison, "network.json": CompressionReport}
    study = compare_projections({"W": np.ones((4, 4))}, ["magnitude"])
    _, report = compress(nn.Linear(9, 9), MagnitudePruner(density=0.5))
    seeds = [
        _written(folder, "study.json", lambda p, r: r.to_json(p), study),
        _written(folder, "network.json", lambda p, r: r.to_json(p), report),
    ]

    def read(place: Path) -> None:
        (path,) = place.iterdir()
        kinds[path.name].from_json(path)

    return Reader(seeds, one(damaged_json), read)


def _read_safetensors(folder: Path) -> None:
    from matfact._safetensors_file import SafetensorsFile
    from matfact.compare import load_weights

    for matrix in load_weights(folder / "m.safetensors", stored=True).values():
        matrix.read()
    file = SafetensorsFile(folder / "m.safetensors")
    for name in file.specs:
        collections.deque(file.chunks(name), maxlen=0)
        file.read(name)


def _read_weights(folder: Path) -> None:
    from matfact.compare import load_weights

    (path,) = folder.iterdir()
    load_weights(path)


def _read_checkpoint(folder: Path) -> None:
    from matfact.checkpoint import Checkpoint

    network = Checkpoint(folder)
    for name in network:
        network[name]


def _read_index(folder: Path) -> None:
    from matfact.checkpoint._config import check_config
    from matfact.checkpoint._source import Source

    source = Source(folder)
    check_config(folder)
    for name in source.matrices():
        source.location(name).read()


def _run_command(folder: Path) -> None:
    """Run a command, which must end with a message and one of its exit statuses."""
    from typer.testing import CliRunner

    from matfact.cli import app

    words = json.loads((folder / "arguments").read_bytes())
    before = os.getcwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, words)
    finally:
        os.chdir(before)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code not in (0, 2, 3):
        raise RuntimeError(f"exit status {result.exit_code}: {result.output}")
    if result.exit_code == 2:
        raise ValueError(result.output)
