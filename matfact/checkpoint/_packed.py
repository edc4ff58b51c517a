"""The products of a layer as one tensor of bytes, as repositories of transformers hold them.

The bytes are a file as `matfact.operators._storage` writes it, with the factors of all groups
of a convolution one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from matfact._safetensors import TensorSpec, serialize
from matfact._safetensors_file import SafetensorsFile
from matfact.operators import Factor, FactorProduct
from matfact.operators._storage import FORMAT, factor_entries, load, pack

#: The method in ``quantization_config``, and the version that is written; a later one is refused.
METHOD, VERSION = "matfact", 1

_NOTHING = TensorSpec("", ())


def packed(products: Iterable[FactorProduct]) -> np.ndarray:
    """Return the bytes of `products`."""
    factors = [factor for product in products for factor in product.factors]
    return np.frombuffer(bytearray(b"".join(pack(factors)[1])), dtype=np.uint8)


def wrapped(content: Sequence[bytes], name: str) -> list[bytes]:
    """Return a file with one tensor `name`, whose bytes are the file `content`."""
    specs = {name: TensorSpec("U8", (sum(map(len, content)),))}
    return list(serialize(specs, content, {"format": "pt"}))


def inner(file: SafetensorsFile, name: str) -> SafetensorsFile:
    """Return the file that the bytes of tensor `name` are, if `file` holds it, else `file`."""
    if FORMAT in file.metadata or file.specs.get(name, _NOTHING).dtype != "U8":
        return file
    return SafetensorsFile.of_bytes(file.read(name).reshape(-1), str(file.path))


def described(content: np.ndarray, name: str) -> list[dict[str, Any]]:
    """Return kind, shape, number of values and bits of each factor in the bytes of tensor `name`.

    Only the header is read.

    Raises
    ------
    ValueError
        If the bytes are no such file.
    """
    file = SafetensorsFile.of_bytes(content, name)
    return [_described(i, entry, file) for i, entry in enumerate(factor_entries(file))]


def _described(i: int, entry: dict[str, Any], file: SafetensorsFile) -> dict[str, Any]:
    try:
        coding = entry.get("quantized")
        shape = file.specs[f"{i}.values"].shape if coding is None else coding["shape"]
        bits = {} if coding is None else {"bits": coding["bits"]}
        known = {"kind": entry["kind"], "shape": entry["shape"], "values": math.prod(shape)}
        return known | bits
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file.path} must describe factor {i}: {error!r}.") from None


def unpacked(
    content: np.ndarray, name: str, factors: Sequence[Sequence[dict[str, Any]]]
) -> list[FactorProduct]:
    """Return the products in the bytes of tensor `name`.

    Parameters
    ----------
    content : ndarray
        The bytes.
    name : str
        The tensor, for errors.
    factors : sequence of sequences
        What `described` must tell about the factors of each product.

    Raises
    ------
    ValueError
        If the bytes are damaged, or hold anything else.
    """
    expected = [entry for product in factors for entry in product]
    if described(content, name) != expected:
        raise ValueError(f"{name} must hold the factors that config.json describes.")
    left: list[Factor] = load(SafetensorsFile.of_bytes(content, name))[::-1]
    return [FactorProduct([left.pop() for _ in product]) for product in factors]
