"""The network to be compressed: one safetensors file, or several with an index."""

from __future__ import annotations

import math
from pathlib import Path

from matfact._json import parse_json
from matfact._safetensors import SafetensorsFile, TensorSpec
from matfact.checkpoint._shards import file_digest

INDEX_SUFFIX = ".index.json"
#: Longest index read, in bytes: room for more than 100 000 tensors.
_LIMIT = 1 << 24
_FLOATS = ("F16", "BF16", "F32", "F64")


class Source:
    """Tensors by name, in whichever file they are.

    Parameters
    ----------
    path : str or Path
        A ``.safetensors`` file, an index (``model.safetensors.index.json``) of several beside
        it, or a folder with either under the names that Hugging Face gives them.

    Attributes
    ----------
    specs : dict of str to TensorSpec
        All tensors.
    metadata : dict of str to str
        What the header of the (first) file holds besides.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a file is damaged or the index does not fit the files.
    """

    def __init__(self, path: str | Path) -> None:
        path = _found(Path(path))
        if path.name.endswith(INDEX_SUFFIX):
            self._files = _indexed(path)
        else:
            file = SafetensorsFile(path)
            self._files = dict.fromkeys(file.specs, file)
        if not self._files:
            raise ValueError(f"path must name a network with tensors, but {path} holds none.")
        self.specs = {name: file.specs[name] for name, file in self._files.items()}
        self.metadata = next(iter(self._files.values())).metadata

    def file(self, name: str) -> SafetensorsFile:
        """Return the file that holds tensor `name`."""
        return self._files[name]

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by name."""
        paths = dict.fromkeys(file.path for file in self._files.values())
        return {path.name: file_digest(path) for path in paths}

    def matrices(self) -> list[str]:
        """Return the names of weights: floating-point matrices and convolutions, not empty."""
        return [name for name, spec in self.specs.items() if is_weight(spec)]


def is_weight(spec: TensorSpec) -> bool:
    """Whether a tensor can be factorized, its trailing dimensions taken together."""
    return spec.dtype in _FLOATS and len(spec.shape) in (2, 4) and math.prod(spec.shape) > 0


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of a weight as a matrix: (out, in·kh·kw) for a convolution."""
    return (shape[0], math.prod(shape[1:]))


def _found(path: Path) -> Path:
    if path.is_dir():
        names = ("model.safetensors" + INDEX_SUFFIX, "model.safetensors")
        path = next((path / name for name in names if (path / name).is_file()), path)
    if not path.is_file():
        raise FileNotFoundError(f"path must name a file of weights, but there is none at {path}.")
    return path


def _indexed(path: Path) -> dict[str, SafetensorsFile]:
    """Return the file of each tensor in the index."""
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} must be an index of at most {_LIMIT} bytes.")
    try:
        places = parse_json(path.read_bytes()).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{path} must be an index in JSON: {error}.") from None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{path} must hold a weight_map from names of tensors to names of files.")
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(set(places.values())):
        if not name or Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{path} must name files beside it, got {name!r}.")
        files[name] = SafetensorsFile(path.with_name(name))
    for name, place in places.items():
        if name not in files[place].specs:
            raise ValueError(f"{path} names {name!r}, which is not in {place!r}.")
    return {name: files[place] for name, place in places.items()}
