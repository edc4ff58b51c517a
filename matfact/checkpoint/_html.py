"""HTML page of a checkpoint."""

from __future__ import annotations

from matfact import _html
from matfact._depth_chart import depth_chart
from matfact._html import Column, Total
from matfact.checkpoint._reader import Checkpoint

_COLUMNS = (
    Column("tensor", "Name of the tensor. The largest error comes first.", "t"),
    Column("stored as", "How each factor is stored, or why the tensor is copied.", "t note"),
    Column("shape", "Shape of the dense tensor."),
    Column("dtype", "Type of its values."),
    Column("density", "Stored values ÷ entries."),
    Column("relative error", "‖W − Ŵ‖ ÷ ‖W‖: what the weight has lost."),
    Column("bytes", "Bytes in the checkpoint."),
    Column("dense", "Bytes of the dense tensor."),
    Column("bits a weight", "Bits in the checkpoint ÷ entries."),
)


def page(checkpoint: Checkpoint) -> str:
    """Return a self-contained page with a line per tensor."""
    tensors = checkpoint.tensors
    errors = {name: tensor.relative_error for name, tensor in tensors.items()}
    largest = max((error for error in errors.values() if error is not None), default=0.0)
    rows = (
        [
            _html.escape(name),
            _html.escape(" · ".join(tensors[name].storage) or tensors[name].note),
            "×".join(map(str, tensors[name].spec.shape)),
            _html.escape(tensors[name].spec.dtype),
            _html.measured(tensors[name].density, 1.0),
            _html.measured(tensors[name].relative_error, largest),
            f"{checkpoint.tensor_nbytes(name):,}",
            f"{tensors[name].spec.nbytes:,}",
            f"{checkpoint.bits_per_weight(name):.2f}",
        ]
        for name in sorted(tensors, key=lambda name: errors[name] or 0.0, reverse=True)
    )
    products = [name for name, tensor in tensors.items() if tensor.is_product]
    # Files are sorted by letters, in which layer 10 comes before layer 2.
    factorized = sorted(products, key=lambda name: [part.zfill(9) for part in name.split(".")])
    lead = (
        f"{len(tensors)} tensors, {len(factorized)} of them factorized; {checkpoint.nbytes:,} of "
        f"{checkpoint.dense_nbytes:,} bytes."
    )
    return _html.page(
        f"Checkpoint {checkpoint.path.name}", lead, _html.totals(_totals(checkpoint)),
        depth_chart([(name, errors[name]) for name in factorized], "relative error"),
        "<h2>Tensors</h2>", _html.table(_COLUMNS, rows, "Tensors"), _html.meanings(_COLUMNS),
        _html.settings(checkpoint.settings),
    )  # fmt: skip


def _totals(checkpoint: Checkpoint) -> list[Total]:
    nbytes, dense = checkpoint.nbytes, checkpoint.dense_nbytes
    share = f"{nbytes / max(1, dense):.1%} of {_html.size(dense)}"
    products = sum(tensor.is_product for tensor in checkpoint.tensors.values())
    return [
        Total(Column("bytes", "Of all tensors in the checkpoint."), _html.size(nbytes), share),
        Total(
            Column("factorized", "Tensors stored as products; others are copied."),
            str(products), f"of {len(checkpoint)} tensors",
        ),
    ]  # fmt: skip
