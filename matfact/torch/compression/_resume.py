"""Finished parts of a run in a folder, with which a killed run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pickle
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import matfact
from matfact import backend
from matfact._safetensors import TensorSpec, in_aligned_order, serialize, stored
from matfact._safetensors_file import SafetensorsFile
from matfact.allocation import Option
from matfact.checkpoint._journal import Journal
from matfact.checkpoint._manifest import Shard, StoredTensor
from matfact.checkpoint._packed import packed
from matfact.checkpoint._shards import check_shard, shard_name, write_shard
from matfact.factorizers import BaseFactorizer
from matfact.factorizers._settings import name_of
from matfact.operators import FactorProduct
from matfact.operators._storage import load
from matfact.torch.calibration._match import Matched, trained
from matfact.torch.calibration.options import Calibration
from matfact.torch.compression._fit import Fitted
from matfact.torch.compression._tasks import Task
from matfact.torch.running._offloaded import fetched
from matfact.torch.running._random import RandomState, drawing

#: Kinds of parts, before the name of what they belong to.
_FIT, _TRIALS, _BLOCK = "fit ", "trials ", "block "
#: Entry in the header of a file with numbers and text; of these, the checksum of a block before
#: its training; and names of tensors.
_PART, _BEGUN = "part", "begun"
_RANDOM, _PRODUCT, _SHIFT = "random state", "product ", "shift "

#: Outcome of the fit of a layer: None if the method cannot handle it; and a remark.
Outcome = tuple[Fitted | None, str]
_Content = tuple[dict[str, Any], dict[str, np.ndarray]]


class Parts:
    """Finished parts of a run: trials for a budget, fits of layers, and trained blocks.

    Parameters
    ----------
    journal : Journal, optional
        Work that has been taken up. By default nothing is stored.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._shards: dict[str, Shard] = {}
        self._random = torch.get_rng_state()
        if journal is not None:
            self._shards = {shard.tensors[0].name: shard for shard in journal.finished.values()}

    @property
    def layers(self) -> set[str]:
        """Names of the layers that have been fitted."""
        return self._named(_FIT)

    @property
    def tried(self) -> set[str]:
        """Names of the trials that have been run."""
        return self._named(_TRIALS)

    def _named(self, kind: str) -> set[str]:
        return {key.removeprefix(kind) for key in self._shards if key.startswith(kind)}

    def fit(self, layer: str) -> Outcome | None:
        """Return the outcome of a layer's fit, None if it has not been fitted."""
        if (found := self._read(_FIT + layer)) is None:
            return None
        fields, arrays = found
        message = fields.pop("message")
        if not fields:
            return None, message
        files = [SafetensorsFile.of_bytes(a.copy(), layer) for a in _listed(arrays, _PRODUCT)]
        products = [FactorProduct(load(file)) for file in files]
        return Fitted(products, shifts=_listed(arrays, _SHIFT), **fields), message

    def add_fit(self, layer: str, outcome: Outcome) -> None:
        """Store the outcome of a layer's fit."""
        fitted, message = outcome
        fields: dict[str, Any] = {"message": message}
        arrays: dict[str, np.ndarray] = {}
        if fitted is not None:
            named = {each.name: getattr(fitted, each.name) for each in dataclasses.fields(fitted)}
            for i, product in enumerate(named.pop("products")):
                arrays[f"{_PRODUCT}{i}"] = packed([product])
            for i, shift in enumerate(named.pop("shifts")):
                arrays[f"{_SHIFT}{i}"] = backend.to_numpy(shift)
            fields |= named
        self._write(_FIT + layer, fields, arrays)

    def trials(self, name: str) -> list[Option] | None:
        """Return the options found by trials, None if there were none."""
        found = self._read(_TRIALS + name)
        return None if found is None else [Option(*each) for each in found[0]["options"]]

    def add_trials(self, name: str, options: list[Option]) -> None:
        """Store the options found by trials."""
        self._write(_TRIALS + name, {"options": [*map(dataclasses.astuple, options)]}, {})

    def matched(self, model: nn.Module, name: str, train: Callable[[], Matched]) -> Matched:
        """Return the result of `train`, or restore that of an earlier training.

        Parameters
        ----------
        model : torch.nn.Module
            The network.
        name : str
            Name of the block.
        train : callable
            Trains the block in place.
        """
        if self._journal is None:
            return train()
        block, found = model.get_submodule(name), self._read(_BLOCK + name)
        begun = _digest(name, _weights(block))
        # Another, if a file with a fit was damaged, and a method without a seed found another fit.
        if found is not None and found[0].pop(_BEGUN) == begun:
            with torch.no_grad():
                for path, values in found[1].items():
                    block.get_parameter(path).copy_(torch.from_numpy(values))
            return Matched(**found[0])
        result = train()
        changed = {id(each) for each in trained(name, model)} if result.after is not None else ()
        own = {n: backend.to_numpy(p) for n, p in block.named_parameters() if id(p) in changed}
        self._write(_BLOCK + name, dataclasses.asdict(result) | {_BEGUN: begun}, own)
        return result

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw the random numbers that the earlier run has drawn."""
        found = next((self._content(shard)[1] for shard in self._shards.values()), None)
        before = self._random if found is None else torch.from_numpy(found[_RANDOM])
        if torch.equal(before, self._random):
            yield
            return
        self._random = before
        present = RandomState.now(torch.device("cpu"))
        with drawing(dataclasses.replace(present, host=before)):
            yield

    def _read(self, key: str) -> _Content | None:
        if (shard := self._shards.get(key)) is None:
            return None
        fields, arrays = self._content(shard)
        del arrays[_RANDOM]
        return fields, arrays

    def _content(self, shard: Shard) -> _Content:
        assert self._journal is not None
        file = check_shard(self._journal.folder, shard, in_memory=True)
        # Python's JSON, since errors may be infinite or NaN. The checksum shows that it is ours.
        return json.loads(file.metadata[_PART]), {name: file.read(name) for name in file.specs}

    def _write(self, key: str, fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        if self._journal is None:
            return
        arrays = arrays | {_RANDOM: self._random.numpy()}
        tensors = {name: stored(array) for name, array in arrays.items()}
        specs = in_aligned_order({name: spec for name, (spec, _) in tensors.items()})
        metadata = {_PART: json.dumps(fields, default=int)}
        content = serialize(specs, (tensors[name][1] for name in specs), metadata)
        last = max((int(Path(shard.file).stem) for shard in self._shards.values()), default=0)
        path = self._journal.folder / shard_name(last + 1)
        shard = write_shard(path, content, [StoredTensor(key, TensorSpec("U8", ()))])
        self._journal.add(shard)
        self._shards[key] = shard


def _listed(arrays: Mapping[str, np.ndarray], kind: str) -> list[np.ndarray]:
    """Return the arrays named by `kind` and a number, in order."""
    return [arrays[f"{kind}{i}"] for i in range(sum(name.startswith(kind) for name in arrays))]


@contextlib.contextmanager
def resuming(folder: str | Path | None, settings: Callable[[], dict[str, Any]]) -> Iterator[Parts]:
    """Yield the finished parts of a run, and store further ones.

    Parameters
    ----------
    folder : str, Path or None
        A new or empty folder, or that of an earlier run; None to store nothing.
    settings : callable
        Returns what the parts depend on.

    Raises
    ------
    ValueError
        If the folder belongs to another run, or to one that is still going on.
    """
    if folder is None:
        yield Parts()
        return
    with Journal(Path(folder)) as journal:  # before hashing the weights, which is slow
        journal.take_up(settings())
        parts = Parts(journal)
        with parts.drawing():
            yield parts


def settings(
    model: nn.Module,
    plans: Mapping[str, list[Task]],
    calibration: Calibration | None,
    budget: Any,
) -> dict[str, Any]:
    """Return what the results of a run depend on, as JSON: weights, methods and options.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    plans : mapping of str to list of Task
        The layers as each method would compress them.
    calibration : Calibration or None
        Its batches must be a collection.
    budget : Budget or None
        What the cost must not exceed.
    """
    content: dict[str, Any] = {
        "generator": f"matfact {matfact.__version__}",
        "weights": _digest("model", _weights(model)),
        "layers": {
            f"{label} {task.names[0]}".strip(): _described(task.factorizer)
            for label, tasks in plans.items()
            for task in tasks
        },
    }
    if budget is not None:
        names = [each.name for each in dataclasses.fields(budget)]
        content["budget"] = {name: _plain(name, getattr(budget, name)) for name in names}
    if calibration is not None:
        names = [each.name for each in dataclasses.fields(calibration)]
        names = [name for name in names if name not in ("batches", "offload_folder")]
        content["calibration"] = {name: getattr(calibration, name) for name in names}
        content["batches"] = _digest("calibration", calibration.batches)
    return content


def _described(factorizer: BaseFactorizer | None) -> dict[str, Any]:
    if factorizer is None:
        return {"method": None}
    parameters = factorizer.get_params()
    named = {name: _plain(name, value) for name, value in sorted(parameters.items())}
    return {"method": name_of(factorizer)} | named


def _plain(name: str, value: Any) -> Any:
    """Return `value`, or its checksum if it is not plain JSON."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return value if value is None or isinstance(value, str) or is_number else _digest(name, value)


def _weights(model: nn.Module) -> Iterator[Any]:
    """Yield name, class and checksums of the tensors of each module."""
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        with fetched(module) if own else contextlib.nullcontext():
            now = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            kept = [(each, _tensor_digest(tensor)) for each, tensor in now if not is_lazy(tensor)]
        yield name, type(module).__qualname__, kept


class _Hashed(pickle.Pickler):
    """Pickles values into a checksum; nothing is ever unpickled. Tensors count by content."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return str, (_tensor_digest(value),)
        if hasattr(value, "keys") and not isinstance(value, type):  # a batch of a tokenizer
            return dict, ([(key, value[key]) for key in value.keys()],)  # noqa: SIM118
        return NotImplemented


def _digest(what: str, value: Any) -> str:
    """Return the checksum of any value, named `what` in errors."""
    found = hashlib.sha256()
    pickler = _Hashed(types.SimpleNamespace(write=found.update), protocol=4)
    pickler.fast = True  # else it would depend on which equal values are one object
    try:
        pickler.dump(list(value) if isinstance(value, Iterator) else value)
    except Exception as error:
        raise ValueError(
            f"{what} must be comparable with that of an earlier run, for resume_folder, but a "
            f"{type(value).__name__} is not: {error}"
        ) from error
    return found.hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    """Return dtype, shape and checksum of a tensor."""
    if tensor.is_nested:
        return " ".join(map(_tensor_digest, tensor.unbind()))
    said = f"{tensor.dtype} {tuple(tensor.shape)}"
    if tensor.is_meta:
        return said
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    plain = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return f"{said} {hashlib.sha256(plain.numpy().data).hexdigest()}"
