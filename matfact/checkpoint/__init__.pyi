__all__ = [
    "Checkpoint",
    "Shard",
    "StoredTensor",
    "UnreadIndexWarning",
    "compress",
    "decompress",
    "save",
]

from ._compress import compress
from ._decompress import decompress
from ._manifest import Shard, StoredTensor
from ._reader import Checkpoint
from ._save import save
from ._source import UnreadIndexWarning
