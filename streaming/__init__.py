"""WebDataset shards on object storage, delivered in an order that no crash and no resize can change. docs/streaming.md."""

from streaming.cache import CacheError, CacheGone, CacheMisfit
from streaming.dataset import Dataset, DatasetError
from streaming.loader import Batch, Decoder, Loader, Stats
from streaming.order import Epoch, Order, Selection
from streaming.processes import ChildDied
from streaming.quarantine import Bad, BadSample, Quarantine, TooManyBadSamples
from streaming.shards import ShardError
from streaming.store import Store, StoreError

__all__ = [
    "Bad",
    "BadSample",
    "Batch",
    "CacheError",
    "CacheGone",
    "CacheMisfit",
    "ChildDied",
    "Dataset",
    "DatasetError",
    "Decoder",
    "Epoch",
    "Loader",
    "Order",
    "Quarantine",
    "Selection",
    "ShardError",
    "Stats",
    "Store",
    "StoreError",
    "TooManyBadSamples",
]
