"""HTML page of a checkpoint."""

from __future__ import annotations

from matfact import _html
from matfact.checkpoint._reader import Checkpoint

_HEADINGS = (
    "tensor",
    "stored as",
    "shape",
    "dtype",
    "density",
    "relative error",
    "bytes",
    "dense",
    "bits a weight",
)


def page(checkpoint: Checkpoint) -> str:
    """Return a self-contained page with a line per tensor."""
    tensors = checkpoint.tensors
    errors = [tensor.relative_error or 0.0 for tensor in tensors.values()]
    rows = (
        [
            _html.escape(name),
            _html.escape(" · ".join(tensor.storage) or tensor.note),
            "×".join(map(str, tensor.spec.shape)),
            _html.escape(tensor.spec.dtype),
            _html.measured(tensor.density, 1.0),
            _html.measured(tensor.relative_error, max(errors)),
            f"{checkpoint.tensor_nbytes(name):,}",
            f"{tensor.spec.nbytes:,}",
            f"{checkpoint.bits_per_weight(name):.2f}",
        ]
        for name, tensor in tensors.items()
    )
    factorized = sum(tensor.is_product for tensor in tensors.values())
    lead = (
        f"{len(tensors)} tensors, {factorized} of them factorized; {checkpoint.nbytes:,} of "
        f"{checkpoint.dense_nbytes:,} bytes."
    )
    table = _html.table(_HEADINGS, rows)
    return _html.page(f"Checkpoint {checkpoint.path.name}", lead, checkpoint.settings, table)
