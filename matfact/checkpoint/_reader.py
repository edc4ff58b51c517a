"""Reading of checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from matfact._layers import LayerReport, is_floating_matrix, is_weight_name, layer_of, matrix_shape
from matfact._safetensors_file import SafetensorsFile
from matfact.checkpoint._manifest import MANIFEST, REPORT, Manifest, Shard, StoredTensor
from matfact.checkpoint._packed import inner
from matfact.checkpoint._shards import check_shard
from matfact.operators import FactorProduct, _storage
from matfact.report import CompressionReport


class Checkpoint(Mapping[str, "FactorProduct | np.ndarray"]):
    """A network on disk: a mapping from names to products of factors or to arrays.

    Only the manifest is read at first. Every tensor is copied into memory and checked against the
    checksums in the manifest on each access. If a file changes later, reading it raises an error,
    and data read before is not affected.

    Parameters
    ----------
    path : str or Path
        The folder.

    Attributes
    ----------
    tensors : dict of str to StoredTensor
        Entry of each tensor in the manifest.
    settings : dict
        How the checkpoint was made.
    metadata : dict of str to str
        Metadata of the original safetensors file.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint in the folder.
    ValueError
        If the manifest is damaged, or on access, if the file of a tensor is damaged.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from matfact import LowRank, checkpoint
    >>> W = np.outer([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 2.0])
    >>> product = LowRank(rank=1).fit(W).operator_
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(folder + "/small", {"fc.weight": product, "fc.bias": np.ones(4)})
    ...     network = checkpoint.Checkpoint(folder + "/small")
    ...     print(sorted(network), network["fc.weight"].nnz, network["fc.bias"])
    ['fc.bias', 'fc.weight'] 8 [1. 1. 1. 1.]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = Manifest.read(self.path)
        self.settings, self.metadata = manifest.settings, manifest.metadata
        self.shards = manifest.shards
        self._shards = {t.name: shard for shard in manifest.shards for t in shard.tensors}
        self.tensors = {t.name: t for shard in manifest.shards for t in shard.tensors}
        self._verified: dict[str, SafetensorsFile] = {}
        self._pending: dict[str, Future[SafetensorsFile]] = {}
        self._held: dict[str, SafetensorsFile] = {}

    def __getitem__(self, name: str) -> FactorProduct | np.ndarray:
        """Return a product with NumPy values, or an array for a tensor that is not factorized.

        bfloat16 becomes float32, which is exact.
        """
        return self.product(name) if self.tensors[name].is_product else self.file(name).read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def files(self) -> list[Path]:
        """All files of the checkpoint, starting with the manifest."""
        return [self.path / name for name in (MANIFEST, *(shard.file for shard in self.shards))]

    @property
    def report(self) -> CompressionReport:
        """Report of the compression, as saved or rebuilt from the manifest.

        Raises
        ------
        ValueError
            If the saved report is invalid.
        """
        if REPORT in self.settings:
            return CompressionReport.from_content(self.settings[REPORT])
        rows = [self._row(tensor) for tensor in self.tensors.values() if _is_weight(tensor)]
        return CompressionReport(rows, self.settings)

    def _row(self, tensor: StoredTensor) -> LayerReport:
        rows, columns = matrix_shape(tensor.spec.shape)
        return LayerReport(
            layer=layer_of(tensor.name),
            kind="",
            rows=rows,
            columns=columns,
            groups=1,
            method=tensor.method,
            status="compressed" if tensor.is_product else "kept",
            dense_nbytes=tensor.spec.nbytes,
            dense_flops=2 * rows * columns,
            density=tensor.density,
            relative_error=tensor.relative_error,
            nbytes=self.tensor_nbytes(tensor.name) if tensor.is_product else None,
            bits_per_weight=self.bits_per_weight(tensor.name) if tensor.is_product else None,
            message=tensor.note,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of all tensors if none were factorized."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes of tensor `name`; of a product, those of its file."""
        tensor = self.tensors[name]
        return self._shards[name].nbytes if tensor.is_product else tensor.spec.nbytes

    def bits_per_weight(self, name: str) -> float:
        """Return the bits of `tensor_nbytes` ÷ entries of tensor `name`."""
        return 8 * self.tensor_nbytes(name) / max(1, math.prod(self.tensors[name].spec.shape))

    def product(self, name: str) -> FactorProduct:
        """Return the factors of tensor `name`."""
        tensor, shard = self.tensors[name], self._shards[name]
        file = self._ahead(shard) or self._read(shard)
        self._held.pop(shard.file, None)
        product = FactorProduct(_storage.load(inner(file, name)))
        if len(tensor.spec.shape) < 2 or product.shape != matrix_shape(tensor.spec.shape):
            raise ValueError(
                f"{file.path} must hold factors of a tensor of shape {tensor.spec.shape}, but "
                f"their product has shape {product.shape}."
            )
        return product

    def file(self, name: str) -> SafetensorsFile:
        """Return the verified file with tensor `name`; later reads are checked too."""
        shard = self._shards[name]
        if file := self._ahead(shard):
            return file
        if shard.file not in self._verified:
            self._verified[shard.file] = self._checked(shard)
        return self._verified[shard.file]

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Read whole files into memory and verify them in a background thread.

        The largest file comes first, as hashing releases the GIL. A file that is needed earlier is
        read by its user. Tensors and factors share the memory of their files.
        """
        shards = sorted(self.shards, key=lambda shard: -shard.nbytes)
        with ThreadPoolExecutor(1) as pool:
            self._pending = {shard.file: pool.submit(self._read, shard) for shard in shards}
            try:
                yield
            finally:
                self._pending, self._held = {}, {}
                pool.shutdown(cancel_futures=True)

    def verify(self) -> None:
        """Check every file, and raise ``ValueError`` if one is damaged."""
        for shard in self.shards:
            self._verified[shard.file] = self._checked(shard)

    def _ahead(self, shard: Shard) -> SafetensorsFile | None:
        """Return the file in memory, if it was read ahead."""
        if pending := self._pending.pop(shard.file, None):
            file = self._read(shard) if pending.cancel() else pending.result()
            self._held[shard.file] = file
        return self._held.get(shard.file)

    def _checked(self, shard: Shard) -> SafetensorsFile:
        return _fitting(check_shard(self.path, shard), shard)

    def _read(self, shard: Shard) -> SafetensorsFile:
        return _fitting(check_shard(self.path, shard, in_memory=True), shard)


def _fitting(file: SafetensorsFile, shard: Shard) -> SafetensorsFile:
    """Return a file after checking its tensors against the manifest."""
    for tensor in shard.tensors:
        if not tensor.is_product and file.specs.get(tensor.name) != tensor.spec:
            raise ValueError(f"{file.path} does not hold the tensors listed in the manifest.")
    return file


def _is_weight(tensor: StoredTensor) -> bool:
    return tensor.is_product or (is_weight_name(tensor.name) and is_floating_matrix(tensor.spec))
