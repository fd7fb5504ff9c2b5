"""Caches of keys and values. A cache owns its memory and its attention; models never ask which one they were given."""

from .base import CacheFull, CacheShape, CacheStats, KVCache, Placement
from .slab_pool import SlabPool

CACHES: dict[str, type[KVCache]] = {"SLAB_POOL": SlabPool}

__all__ = ["CACHES", "CacheFull", "CacheShape", "CacheStats", "KVCache", "Placement", "SlabPool"]
