"""Repositories of `transformers`: which folders are some, and what belongs in a compressed one."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matfact._files import write_atomically
from matfact._layers import Kept, layer_of
from matfact._regular import read_whole
from matfact._safetensors import SINGLE_FILE
from matfact._safetensors_file import SafetensorsFile
from matfact.checkpoint._config import (
    CONFIG,
    SMALL_LIMIT,
    copy_others,
    is_read,
    parsed,
    without_sparsity,
)
from matfact.checkpoint._manifest import Shard
from matfact.checkpoint._packed import METHOD, VERSION, described
from matfact.checkpoint._source import INDEX_SUFFIX

#: Entry of a configuration that says how weights are stored.
ENTRY = "quantization_config"
#: One expert of many, which `transformers` merges into one tensor.
_MERGED = "one of many experts, which transformers merges into one tensor"
_CONVERTED = "transformers splits it, or joins it with others, to load it"
_EXPERT = re.compile(r"\.experts\.\d+\.")


class Repository:
    """A folder with a configuration and weights that are dense, or read as such.

    Parameters
    ----------
    folder : Path
        The folder.

    Attributes
    ----------
    config : dict
        Content of ``config.json``.
    sha256 : str
        Its checksum.

    Raises
    ------
    ValueError
        If ``config.json`` is damaged, or describes weights compressed by this library.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = read_whole(folder / CONFIG, SMALL_LIMIT)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.config = parsed(folder / CONFIG, content)
        entry = self.config.get(ENTRY)
        if isinstance(entry, dict) and entry.get("quant_method") == METHOD:
            raise ValueError(f"{folder} must hold dense weights, but was compressed by matfact.")

    @classmethod
    def at(cls, source: str | Path) -> Repository | None:
        """Return the repository at `source`, or None if this is no folder of weights that are read.

        Its configuration is that of dense weights, also if they are stored in a sparse format.
        """
        if not (Path(source) / CONFIG).is_file():
            return None
        found = cls(Path(source))
        if not is_read(found.config):
            return None
        found.config = without_sparsity(found.config)
        return found

    def kept(self, names: Iterable[str], kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """Return what is `kept` in a repository, even if it is requested."""
        others = {name: Kept(_CONVERTED) for name in _converted(self.folder, names)}
        experts = {name: Kept(_MERGED) for name in names if _EXPERT.search(name)}
        return others | experts | {name: Kept(reason.reason) for name, reason in kept.items()}

    def complete(self, output: Path, shards: Sequence[Shard]) -> None:
        """Add to the `shards` in `output` what ``from_pretrained`` reads."""
        places = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        products = [t.name for shard in shards for t in shard.tensors if t.is_product]
        entry: Mapping[str, Any] = {
            "quant_method": METHOD,
            "version": VERSION,
            "layout": "stored",  # products of the weights as files hold them
            "layers": {layer_of(n): _layer(output / places[n], n) for n in products},
        }
        total = sum(shard.nbytes for shard in shards)
        _write(output / CONFIG, self.config | ({ENTRY: entry} if products else {}))
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write(output / (SINGLE_FILE + INDEX_SUFFIX), index)
        copy_others(self.folder, output)


def _converted(folder: Path, names: Iterable[str]) -> list[str]:
    """Return what `transformers` changes while it loads `names`, as far as it is installed."""
    try:  # by name, since it is on a floor above
        known: Any = importlib.import_module("matfact.transformers._names")
    except ImportError:
        return []
    found: list[str] = known.converted(folder, names)
    return found


def _layer(path: Path, name: str) -> dict[str, Any]:
    content = SafetensorsFile(path, in_memory=True).read(name)
    return {"factors": [described(content, name)], "nbytes": content.size}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
