"""The other files of a folder in the layout of Hugging Face: configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matfact._files import replacing
from matfact._json import parse_json
from matfact._regular import read_whole
from matfact.checkpoint._manifest import MANIFEST
from matfact.checkpoint._packed import METHOD
from matfact.checkpoint._source import INDEX_SUFFIX

CONFIG = "config.json"
#: Formats of compressed-tensors in which values are not quantized.
_READ = ("dense", "sparse-bitmask", "sparse-24-bitmask")
#: Names of its settings over the releases; "" for the configuration itself, in the first ones.
_PLACES = ("", "quantization_config", "compression_config")
_SPARSITY = "sparsity_config"
#: Endings of files without weights, and their maximum size in bytes.
_SMALL = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")
SMALL_LIMIT = 1 << 26


def read_config(source: Path) -> dict[str, Any] | None:
    """Return the configuration of a folder, None without one; ``ValueError`` if it is damaged."""
    path = _config_of(source)
    return None if path is None else parsed(path, read_whole(path, SMALL_LIMIT))


def parsed(path: Path, content: bytes) -> dict[str, Any]:
    """Return the configuration that a file holds; ``ValueError`` if it is damaged."""
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object: {error}.") from None


def is_read(config: dict[str, Any]) -> bool:
    """Whether all formats of weights that a configuration names are read."""
    return all(found in _READ for _, found in _formats(config))


def check_config(source: Path) -> None:
    """Raise ``ValueError`` if the configuration is damaged or names another format of weights."""
    for what, found in _formats(read_config(source) or {}):
        if found == METHOD:
            raise ValueError(
                f"{_folder(source)} must hold a checkpoint of matfact, or weights not compressed "
                "by it, but save_pretrained wrote it: load it with from_pretrained. Its method "
                "dequantize() makes it dense."
            )
        if found not in _READ:
            raise ValueError(
                f"{_config_of(source)} must describe weights that are not quantized, in a format "
                f"among {', '.join(_READ)}, but {what} is {found!r}. If the file of weights is of "
                "another format than that, name the file itself."
            )


def without_sparsity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the same network with dense weights."""
    return {key: value for key, value in config.items() if key not in (*_PLACES, _SPARSITY)}


def copy_others(source: Path, output: Path) -> None:
    """Copy the small files beside the weights of a folder, such as those of the tokenizer."""
    folder = _folder(source)
    if folder is None:
        return
    for path in _others(folder):
        if path.parent.resolve() == output.resolve():  # it may lie in the folder
            continue
        target = output / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as file:
            file.write(read_whole(path, SMALL_LIMIT))


def _others(folder: Path) -> Iterator[Path]:
    """Yield the small files in a folder, and the configurations of parts one folder below."""
    for path in sorted([*folder.iterdir(), *folder.glob(f"*/{CONFIG}")]):
        is_ours = path.name.endswith(INDEX_SUFFIX) or path in (folder / CONFIG, folder / MANIFEST)
        if path.suffix in _SMALL and not is_ours and path.is_file():
            yield path


def _folder(source: Path) -> Path | None:
    """Return the folder that is converted as a whole, None if a single file is."""
    if source.is_dir():
        return source
    return source.parent if source.name.endswith(INDEX_SUFFIX) else None


def _config_of(source: Path) -> Path | None:
    folder = _folder(source)
    return folder / CONFIG if folder is not None and (folder / CONFIG).is_file() else None


def _formats(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the formats of weights that a configuration names, and where."""
    for place in _PLACES:
        settings = config.get(place) if place else config
        if settings is None:
            continue
        if not isinstance(settings, dict):
            yield place, settings
            continue
        sparsity = settings.get(_SPARSITY) or {}
        if not isinstance(sparsity, dict):
            yield _SPARSITY, sparsity
        else:
            yield f"{_SPARSITY}.format", sparsity.get("format") or "dense"
        if place:
            method = settings.get("quant_method") or "compressed-tensors"
            if method != "compressed-tensors":
                yield f"{place}.quant_method", method
            yield f"{place}.format", settings.get("format") or "dense"
            if settings.get("transform_config"):  # applied to inputs, so weights alone are wrong
                yield f"{place}.transform_config", settings["transform_config"]
