"""The manifest of a checkpoint: its tensors, files and checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matfact._files import replacing
from matfact._json import is_version, parse_json
from matfact._regular import read_whole
from matfact._safetensors import TensorSpec, checked_spec

MANIFEST = "manifest.json"
#: Of work that is not complete.
JOURNAL = "journal.log"
FORMAT = "matfact-checkpoint"
#: What is written; earlier versions are read.
VERSION = 2
#: Where settings hold the report of a compression.
REPORT = "report"

#: Maximum size of a manifest, in bytes.
_LIMIT = 1 << 26
_HEAD = b'{"sha256":"'
_ZEROS = b"0" * 64
_FILE = re.compile(r"[0-9]{5,9}\.safetensors")
DIGEST = re.compile(r"[0-9a-f]{64}")


class StoredTensor(NamedTuple):
    """A tensor of the network, stored as factors or unchanged.

    Attributes
    ----------
    name : str
        Its name in the network.
    spec : TensorSpec
        Its dtype and shape in the network.
    storage : tuple of str
        Storage format of each factor; empty for an unchanged tensor.
    method : str
        Factorization method, if known.
    density : float or None
        Stored values ÷ entries, for factors.
    relative_error : float or None
        ``‖W − Ŵ‖_F / ‖W‖_F`` of the stored factors.
    note : str
        Why a tensor is not factorized, if known.
    """

    name: str
    spec: TensorSpec
    storage: tuple[str, ...] = ()
    method: str = ""
    density: float | None = None
    relative_error: float | None = None
    note: str = ""

    @property
    def is_product(self) -> bool:
        """Whether it is stored as factors."""
        return bool(self.storage)

    def to_json(self) -> dict[str, Any]:
        """Return the entry in the manifest, without fields that do not apply."""
        fields = self._asdict()
        del fields["spec"]
        shown = {k: v for k, v in fields.items() if v not in (None, "", ())}
        return shown | {"dtype": self.spec.dtype, "shape": list(self.spec.shape)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StoredTensor:
        """Rebuild it, or raise ``ValueError``."""
        text = {k: _typed(fields, k, str, "") for k in ("name", "method", "note")}
        measures = {k: _typed(fields, k, float, None) for k in ("density", "relative_error")}
        storage = _typed(fields, "storage", list, [])
        if not all(isinstance(kind, str) for kind in storage):
            raise ValueError("storage must hold names")
        return cls(
            spec=checked_spec(fields.get("dtype"), fields.get("shape")),
            storage=tuple(storage),
            **text,
            **measures,
        )


class Shard(NamedTuple):
    """A file, with the factors of one tensor, or with any number of unchanged tensors.

    Attributes
    ----------
    file : str
        Its name in the folder.
    nbytes : int
        Its size.
    sha256 : str
        Checksum of its bytes.
    tensors : tuple of StoredTensor
        Its tensors.
    """

    file: str
    nbytes: int
    sha256: str
    tensors: tuple[StoredTensor, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the entry in the manifest."""
        own = {"file": self.file, "nbytes": self.nbytes, "sha256": self.sha256}
        return own | {"tensors": [tensor.to_json() for tensor in self.tensors]}

    @classmethod
    def from_json(cls, fields: Any) -> Shard:
        """Rebuild it, or raise ``ValueError``."""
        if not isinstance(fields, dict):
            raise ValueError("a shard must be a JSON object")
        file, digest = _typed(fields, "file", str), _typed(fields, "sha256", str)
        if not _FILE.fullmatch(file) or not DIGEST.fullmatch(digest):
            raise ValueError(f"no shard can be called {file!r} with checksum {digest!r}")
        tensors = _typed(fields, "tensors", list)
        if not tensors or not all(isinstance(tensor, dict) for tensor in tensors):
            raise ValueError("tensors must be JSON objects")
        held = tuple(StoredTensor.from_json(tensor) for tensor in tensors)
        if len(held) > 1 and any(tensor.is_product for tensor in held):
            raise ValueError(f"{file} must hold the factors of one tensor, or none")
        return cls(file, _typed(fields, "nbytes", int), digest, held)


def _typed(fields: Mapping[str, Any], key: str, kind: type, default: Any = ...) -> Any:
    value = fields.get(key, default)
    if (value is not default and type(value) is not kind) or value is ...:
        raise ValueError(f"{key} must be a {kind.__name__}, got {value!r}")
    return value


class Manifest(NamedTuple):
    """Contents of the manifest.

    Attributes
    ----------
    shards : tuple of Shard
        Its files.
    settings : dict
        How it was made.
    metadata : dict of str to str
        Metadata of the original safetensors file.
    """

    shards: tuple[Shard, ...]
    settings: dict[str, Any]
    metadata: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the manifest, which completes the checkpoint in `folder`."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "metadata": self.metadata,
            "shards": [shard.to_json() for shard in self.shards],
        }
        body = json.dumps(content, indent=1, allow_nan=False).encode()[1:]
        digest = hashlib.sha256(_HEAD + _ZEROS + b'",' + body).hexdigest().encode()
        with replacing(folder / MANIFEST) as file:
            file.write(_HEAD + digest + b'",' + body)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the checkpoint in `folder`.

        Raises
        ------
        FileNotFoundError
            If there is no manifest.
        ValueError
            If it is damaged, or of another format or version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"path must name a folder with a {MANIFEST}, but there is none in {folder}."
                f"{_what_is(folder)}"
            )
        try:
            return cls._parsed(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged or not a manifest: {error}.") from None

    @classmethod
    def _parsed(cls, path: Path) -> Manifest:
        content = read_whole(path, _LIMIT)
        begin, end = len(_HEAD), len(_HEAD) + len(_ZEROS)
        digest = hashlib.sha256(content[:begin] + _ZEROS + content[end:]).hexdigest().encode()
        if not content.startswith(_HEAD) or content[begin:end] != digest:
            raise ValueError("its checksum is wrong")
        fields = parse_json(content)
        if not is_version(fields, FORMAT, VERSION):
            raise ValueError(
                f"it must be of format {FORMAT}, version 1 to {VERSION}, got "
                f"{fields.get('format')!r}, version {fields.get('version')!r}"
            )
        shards = tuple(Shard.from_json(shard) for shard in _typed(fields, "shards", list))
        _check_unique([shard.file for shard in shards])
        _check_unique([tensor.name for shard in shards for tensor in shard.tensors])
        metadata = _typed(fields, "metadata", dict)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata must be strings")
        return cls(shards, _typed(fields, "settings", dict), metadata)


def _what_is(folder: Path) -> str:
    """Return what a folder without manifest may be."""
    if (folder / JOURNAL).is_file():
        return " Work there is not complete: the command that began it resumes it."
    if (folder / "config.json").is_file():
        return " Networks that save_pretrained wrote have none: from_pretrained loads them."
    return ""


def _check_unique(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} comes twice")
        seen.add(name)
