"""Repositories of `transformers`: which folders are some, and what belongs in a compressed one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matfact._files import replacing, write_atomically
from matfact._json import parse_json
from matfact._layers import Kept, layer_of
from matfact._regular import read_whole
from matfact._safetensors_file import SafetensorsFile
from matfact.checkpoint._manifest import Shard
from matfact.checkpoint._packed import METHOD, VERSION, described
from matfact.checkpoint._source import INDEX_SUFFIX, SINGLE_FILE

CONFIG = "config.json"
#: Entry of a configuration that says how weights are stored.
ENTRY = "quantization_config"
#: Maximum size of a configuration, in bytes.
_LIMIT = 1 << 26
#: Files that belong to a repository besides weights: configurations, tokenizers, texts.
_COPIED = frozenset({".json", ".txt", ".model", ".jinja", ".md", ".tiktoken"})
#: One expert of many, which `transformers` merges into one tensor.
_MERGED = "one of many experts, which transformers merges into one tensor"
_EXPERT = re.compile(r"\.experts\.\d+\.")


class Repository:
    """A folder with a configuration and dense weights.

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
        content = read_whole(folder / CONFIG, _LIMIT)
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self.config = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG} must be a JSON object: {error}.") from None
        entry = self.config.get(ENTRY)
        if isinstance(entry, dict) and entry.get("quant_method") == METHOD:
            raise ValueError(f"{folder} must hold dense weights, but was compressed by matfact.")

    @classmethod
    def at(cls, source: str | Path) -> Repository | None:
        """Return the repository at `source`, or None if this is no folder of dense weights."""
        if not (Path(source) / CONFIG).is_file():
            return None
        found = cls(Path(source))
        return None if ENTRY in found.config else found

    def kept(self, names: Iterable[str], kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """Return what is `kept` in a repository, even if it is requested."""
        experts = {name: Kept(_MERGED) for name in names if _EXPERT.search(name)}
        return experts | {name: Kept(reason.reason) for name, reason in kept.items()}

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
        for path in self._others():
            target = output / path.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            with replacing(target) as copy, path.open("rb") as file:
                shutil.copyfileobj(file, copy)

    def _others(self) -> list[Path]:
        """Return the files to copy, with the configurations of parts one folder below."""
        held = [p for p in self.folder.iterdir() if p.suffix in _COPIED]
        held += self.folder.glob(f"*/{CONFIG}")
        written = (CONFIG, "manifest.json", "journal.log")
        return [
            path
            for path in sorted(held)
            if path.is_file()
            and not path.name.endswith(INDEX_SUFFIX)
            and (path.parent != self.folder or path.name not in written)
        ]


def _layer(path: Path, name: str) -> dict[str, Any]:
    content = SafetensorsFile(path, in_memory=True).read(name)
    return {"factors": [described(content, name)], "nbytes": content.size}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
