"""Source network: one safetensors or GGUF file, or several safetensors files with an index."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from matfact._bitmasks import dense_names, locate
from matfact._gguf import SUFFIX, GgufFile
from matfact._json import parse_json
from matfact._layers import Kept, kept_tensors
from matfact._regular import read_whole
from matfact._safetensors import SINGLE_FILE, TensorSpec
from matfact._safetensors_file import Located, SafetensorsFile, TensorLocation

INDEX_SUFFIX = ".index.json"
#: Maximum size of an index, in bytes; enough for more than 100 000 tensors.
_LIMIT = 1 << 24


class UnreadIndexWarning(UserWarning):
    """A folder holds one file of weights and an index of others, which is ignored."""


class Source:
    """Tensors by name, in one or several files.

    Parameters
    ----------
    path : str or Path
        A ``.safetensors`` or ``.gguf`` file, an index (``model.safetensors.index.json``) of several
        safetensors files in the same folder, or a folder with such a file or an index under the
        names used by Hugging Face. With both, the index is ignored, since it may be outdated.

    Attributes
    ----------
    specs : dict of str to TensorSpec
        All tensors. Weights stored with bitmasks are dense here, as when they are read.
    metadata : dict of str to str
        Metadata in the header of the (first) file.

    Raises
    ------
    FileNotFoundError
        If `path` does not exist.
    ImportError
        If a GGUF file is given and gguf is not installed.
    ValueError
        If a file is damaged or the index does not fit the files.
    """

    def __init__(self, path: str | Path) -> None:
        path = _found(Path(path))
        self._files: Mapping[str, SafetensorsFile | GgufFile]  # by name of the stored tensor
        if path.name.endswith(INDEX_SUFFIX):
            self._files = _indexed(path)
        else:
            file = GgufFile(path) if path.suffix.lower() == SUFFIX else SafetensorsFile(path)
            self._files = dict.fromkeys(file.specs, file)
        if not self._files:
            raise ValueError(f"path must name a network with tensors, but {path} holds none.")
        try:
            self._masked = dense_names(self._files)
        except ValueError as error:
            raise ValueError(f"path must name an intact network, but in {path} {error}") from None
        parts = {part for names in self._masked.values() for part in names.values()}
        plain = {n: file.specs[n] for n, file in self._files.items() if n not in parts}
        self.specs = plain | {name: self.location(name).spec for name in self._masked}
        self.metadata = next(iter(self._files.values())).metadata

    @property
    def masked(self) -> Collection[str]:
        """Names of the weights stored with bitmasks."""
        return self._masked.keys()

    @property
    def files(self) -> list[Path]:
        """The files, each once."""
        return [file.path for file in dict.fromkeys(self._files.values())]

    def location(self, name: str) -> Located:
        """Return where tensor `name` is; with its checksum, once files are hashed."""
        if name in self._masked:
            return locate(name, self._masked[name], self._stored)
        return self._files[name].location(name)

    def _stored(self, name: str) -> TensorLocation:
        location = self._files[name].location(name)
        if not isinstance(location, TensorLocation):
            raise ValueError(f"{name!r} in {self._files[name].path} must not be quantized.")
        return location

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by name; later reads are checked against it."""
        return {file.path.name: file.sha256 for file in dict.fromkeys(self._files.values())}

    def matrices(self) -> list[str]:
        """Return the names of the weights that may be factorized."""
        return [name for name in self.specs if name not in self.kept]

    @functools.cached_property
    def kept(self) -> dict[str, Kept]:
        """All other tensors, and why they are kept."""
        return kept_tensors(self.specs, self.shared)

    @functools.cached_property
    def shared(self) -> dict[str, str]:
        """Tensors shared by several modules, each with another name.

        Files store them once and note the other names, or store them repeatedly.
        """
        return dict(self._equal_to_tables()) | dict(self._noted_as_shared())

    def _noted_as_shared(self) -> Iterator[tuple[str, str]]:
        """Yield all names of shared tensors, each with another name of the tensor.

        safetensors stores only one of them. The omitted names count too: a layer whose weight is
        stored may share its bias under an omitted name.
        """
        groups: dict[str, list[str]] = {}
        for file in dict.fromkeys(self._files.values()):
            for dropped, name in file.metadata.items():
                if name in self.specs and dropped not in self.specs:
                    groups.setdefault(name, [name]).append(dropped)
        for names in groups.values():
            first, second = sorted(names)[:2]
            yield from ((name, first if name != first else second) for name in names)

    def _equal_to_tables(self) -> Iterator[tuple[str, str]]:
        """Yield pairs of weights and identical embedding tables."""
        kept = kept_tensors(self.specs)
        guessed = [name for name, reason in kept.items() if reason.is_guess]
        weights = [name for name in self.specs if name not in kept]
        alike = {self.specs[name] for name in guessed} & {self.specs[name] for name in weights}
        tables = {self._content(name): name for name in guessed[::-1] if self.specs[name] in alike}
        for name in weights:
            table = tables.get(self._content(name)) if self.specs[name] in alike else None
            if table is not None:
                yield from ((name, table), (table, name))

    def _content(self, name: str) -> tuple[TensorSpec, bytes]:
        """Return a key shared only by tensors with the same numbers."""
        location = self.location(name)
        if isinstance(location, TensorLocation):
            return self.specs[name], self._files[name].digest(name)
        whole = hashlib.sha256()
        for chunk in location.chunks():
            whole.update(chunk)
        return self.specs[name], whole.digest()


def _found(path: Path) -> Path:
    """Return the file or index; in a folder prefer the single file, like transformers."""
    if path.is_dir():
        present = [f for f in (SINGLE_FILE, SINGLE_FILE + INDEX_SUFFIX) if (path / f).is_file()]
        if len(present) == 2:
            warnings.warn(
                f"{path} holds {present[0]} and {present[1]}: only the first is read. To read the "
                "files of the index, pass the index itself as the source.",
                UnreadIndexWarning,
                stacklevel=4,
            )
        path = path / present[0] if present else path
    if not path.is_file():
        raise FileNotFoundError(f"path must name a file of weights, but there is none at {path}.")
    return path


def _indexed(path: Path) -> dict[str, SafetensorsFile]:
    """Return the file of each tensor, including tensors of these files that the index omits."""
    places = _places(path)
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(set(places.values())):
        if not name or Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{path} must name files in its own folder, got {name!r}.")
        files[name] = SafetensorsFile(path.with_name(name))
    for name, place in places.items():
        if name not in files[place].specs:
            raise ValueError(f"{path} names {name!r}, which is not in {place!r}.")
    held = {name: files[place] for name, place in places.items()}
    for place, file in files.items():
        for name in file.specs:
            if held.setdefault(name, file) is not file:
                raise ValueError(
                    f"{path} must name files that hold each tensor once, but {name!r} is in "
                    f"{held[name].path.name!r} and in {place!r}."
                )
    return held


def _places(path: Path) -> dict[str, str]:
    """Return the name of the file of each tensor in an index."""
    content = read_whole(path, _LIMIT)
    try:
        places = parse_json(content).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{path} must be an index in JSON: {error}.") from None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{path} must hold a weight_map from names of tensors to names of files.")
    return places
