__all__ = [
    "Checkpoint",
    "Shard",
    "StoredTensor",
    "UnreadIndexWarning",
    "compress",
    "convert",
    "decompress",
    "save",
    "to_dense",
]

from ._compress import compress
from ._convert import convert
from ._decompress import decompress
from ._dense import to_dense
from ._manifest import Shard, StoredTensor
from ._reader import Checkpoint
from ._save import save
from ._source import UnreadIndexWarning
