"""Networks on disk: factors beside the tensors that stay as they are, readable with NumPy alone.

The layout is described in ``docs/checkpoint-format.md``.
"""

from matfact.checkpoint._compress import compress
from matfact.checkpoint._decompress import decompress
from matfact.checkpoint._manifest import Shard, StoredTensor
from matfact.checkpoint._reader import Checkpoint
from matfact.checkpoint._save import save

__all__ = ["Checkpoint", "Shard", "StoredTensor", "compress", "decompress", "save"]
