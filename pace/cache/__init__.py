"""Caches of keys and values. A cache owns its memory and its attention; models never ask which one they were given."""

from .base import CacheFull, CacheShape, CacheStats, KVCache, Placement, check_block_tokens
from .bmc import BMC
from .dynamic import Dynamic
from .paged import Paged
from .slab_pool import SlabPool

CACHES: dict[str, type[KVCache]] = {"SLAB_POOL": SlabPool, "PAGED": Paged, "BMC": BMC, "DYNAMIC": Dynamic}

__all__ = [
    "BMC",
    "CACHES",
    "CacheFull",
    "CacheShape",
    "CacheStats",
    "Dynamic",
    "KVCache",
    "Paged",
    "Placement",
    "SlabPool",
    "check_block_tokens",
]
