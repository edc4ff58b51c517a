"""Writing of checkpoints from memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matfact._files import output_folder, replacing_folder
from matfact._layers import LayerReport, layer_of, matrix_shape
from matfact._safetensors import Stored, TensorSpec
from matfact.backend import Array
from matfact.checkpoint._manifest import REPORT, Manifest, StoredTensor
from matfact.checkpoint._shards import shard_name, write_plain, write_shard
from matfact.operators import FactorProduct
from matfact.operators._encoding import stored_array, stored_dtype
from matfact.operators._storage import pack
from matfact.report import CompressionReport


def save(
    path: str | Path,
    tensors: Mapping[str, FactorProduct | Array],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    report: CompressionReport | None = None,
    settings: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write products and arrays of any array library as a checkpoint, atomically.

    Parameters
    ----------
    path : str or Path
        A new or empty folder, or a link to one.
    tensors : mapping of str to FactorProduct or array
        Products and arrays by name. Dtypes are kept, including torch's bfloat16.
    shapes : mapping of str to tuple of int, optional
        Shapes in the network, for products whose shape there differs, such as convolutions.
    report : CompressionReport, optional
        Report of the compression, for the manifest.
    settings : mapping, optional
        How the network was made; any values that JSON can represent.
    metadata : mapping of str to str, optional
        Metadata for the safetensors file written by ``decompress``.

    Raises
    ------
    FileExistsError
        If `path` exists and is not an empty folder.
    ValueError
        If a shape does not fit its product, or a dtype cannot be stored.
    """
    target = output_folder(path)
    products = {k: v for k, v in tensors.items() if isinstance(v, FactorProduct)}
    arrays = {k: _stored(k, v) for k, v in tensors.items() if k not in products}
    specs = {name: _spec(name, product, shapes or {}) for name, product in products.items()}
    layers = {row.layer: row for row in report or ()}
    with replacing_folder(target) as folder:
        shards = []
        if arrays:
            pieces = {name: (spec, [data]) for name, (spec, data) in arrays.items()}
            shards.append(write_plain(folder / shard_name(0), pieces))
        for i, (name, product) in enumerate(products.items(), start=1):
            kinds, content = pack(product.factors)
            known = _recorded(layers.get(layer_of(name)))
            tensor = StoredTensor(name, specs[name], kinds, density=product.density, **known)
            shards.append(write_shard(folder / shard_name(i), content, [tensor]))
        settings = dict(settings or {}) | ({} if report is None else {REPORT: report.content()})
        Manifest(tuple(shards), settings, dict(metadata or {})).write(folder)


def _recorded(row: LayerReport | None) -> dict[str, Any]:
    """Return the fields of a weight in the manifest from a report."""
    if row is None:
        return {}
    error = row.relative_error
    is_known = error is not None and math.isfinite(error)
    return {"method": row.method, "relative_error": error if is_known else None}


def _stored(name: str, array: Array) -> Stored:
    try:
        return stored_array(array)
    except ValueError as error:
        raise ValueError(f"tensors must have supported dtypes, but {name!r}: {error}") from None


def _spec(name: str, product: FactorProduct, shapes: Mapping[str, tuple[int, ...]]) -> TensorSpec:
    """Return the dtype and shape of a tensor in the network."""
    shape = tuple(shapes.get(name, product.shape))
    if len(shape) < 2 or matrix_shape(shape) != product.shape:
        raise ValueError(
            f"shapes must fit the products, but {name!r} has shape {product.shape}, not {shape}."
        )
    return TensorSpec(stored_dtype(product.factors[0]), shape)
