"""Networks on disk: factors beside the tensors that stay as they are, readable with NumPy alone.

The layout is described in ``docs/checkpoint-format.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "Checkpoint",
    "Shard",
    "StoredTensor",
    "UnreadIndexWarning",
    "compress",
    "decompress",
    "save",
]

if TYPE_CHECKING:
    from matfact.checkpoint._compress import compress
    from matfact.checkpoint._decompress import decompress
    from matfact.checkpoint._manifest import Shard, StoredTensor
    from matfact.checkpoint._reader import Checkpoint
    from matfact.checkpoint._save import save
    from matfact.checkpoint._source import UnreadIndexWarning
else:
    from matfact._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "_compress": ("compress",),
            "_decompress": ("decompress",),
            "_manifest": ("Shard", "StoredTensor"),
            "_reader": ("Checkpoint",),
            "_save": ("save",),
            "_source": ("UnreadIndexWarning",),
        },
    )
