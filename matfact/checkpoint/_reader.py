"""Reading a checkpoint."""

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
from matfact.checkpoint._shards import check_shard
from matfact.operators import FactorProduct, _storage
from matfact.report import CompressionReport


class Checkpoint(Mapping[str, "FactorProduct | np.ndarray"]):
    """A network on disk: a mapping from names to products of factors or to arrays.

    Nothing but the manifest is read before it is asked for. Whatever is read is checked against
    the checksums in the manifest, each time, and is in memory of its own: a file that changes
    later is refused, and changes nothing that was read before.

    Parameters
    ----------
    path : str or Path
        The folder.

    Attributes
    ----------
    tensors : dict of str to StoredTensor
        What the manifest says of each tensor.
    settings : dict
        How the checkpoint was made.
    metadata : dict of str to str
        What the file it was made from held beside its tensors.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint in the folder.
    ValueError
        If the manifest is damaged; on access, if the file of a tensor is.

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
        """Return factors as a product with NumPy values, another tensor as an array.

        bfloat16 becomes float32, which holds it exactly.
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
        """All files of the checkpoint, the manifest first."""
        return [self.path / name for name in (MANIFEST, *(shard.file for shard in self.shards))]

    @property
    def report(self) -> CompressionReport:
        """What was done to the network: as it was saved, or what the manifest says of weights.

        Raises
        ------
        ValueError
            If what is saved is no report.
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
            message=tensor.note,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of all tensors, were none of them factorized."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def tensor_nbytes(self, name: str) -> int:
        """Return the bytes that tensor `name` takes, those of its own file if it is a product."""
        tensor = self.tensors[name]
        return self._shards[name].nbytes if tensor.is_product else tensor.spec.nbytes

    def bits_per_weight(self, name: str) -> float:
        """Return the bits of :meth:`tensor_nbytes` ÷ entries of tensor `name`."""
        return 8 * self.tensor_nbytes(name) / max(1, math.prod(self.tensors[name].spec.shape))

    def product(self, name: str) -> FactorProduct:
        """Return the factors of tensor `name`."""
        tensor, shard = self.tensors[name], self._shards[name]
        file = self._ahead(shard) or self._read(shard)
        self._held.pop(shard.file, None)
        product = FactorProduct(_storage.load(file))
        if len(tensor.spec.shape) < 2 or product.shape != matrix_shape(tensor.spec.shape):
            raise ValueError(
                f"{file.path} must hold factors of a tensor of shape {tensor.spec.shape}, but "
                f"their product has shape {product.shape}."
            )
        return product

    def file(self, name: str) -> SafetensorsFile:
        """Return the verified file that holds tensor `name`; what is read of it is checked too."""
        shard = self._shards[name]
        if file := self._ahead(shard):
            return file
        if shard.file not in self._verified:
            self._verified[shard.file] = self._checked(shard)
        return self._verified[shard.file]

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Read the files into memory, whole, and check them in another thread, meanwhile.

        It begins with the largest, whose bytes are hashed whatever other threads do. A file that is
        used before its turn is read by who uses it. Tensors that are kept as they are share the
        memory of their file, and factors that of theirs.
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
        """Check every file, and raise ``ValueError`` where one is damaged."""
        for shard in self.shards:
            self._verified[shard.file] = self._checked(shard)

    def _ahead(self, shard: Shard) -> SafetensorsFile | None:
        """Return the file in memory, if files are read ahead."""
        if pending := self._pending.pop(shard.file, None):
            file = self._read(shard) if pending.cancel() else pending.result()
            self._held[shard.file] = file
        return self._held.get(shard.file)

    def _checked(self, shard: Shard) -> SafetensorsFile:
        return _fitting(check_shard(self.path, shard), shard)

    def _read(self, shard: Shard) -> SafetensorsFile:
        return _fitting(check_shard(self.path, shard, in_memory=True), shard)


def _fitting(file: SafetensorsFile, shard: Shard) -> SafetensorsFile:
    """Return a file that holds what the manifest says of it."""
    for tensor in shard.tensors:
        if not tensor.is_product and file.specs.get(tensor.name) != tensor.spec:
            raise ValueError(f"{file.path} does not hold what the manifest says of it.")
    return file


def _is_weight(tensor: StoredTensor) -> bool:
    return tensor.is_product or (is_weight_name(tensor.name) and is_floating_matrix(tensor.spec))
