"""What the engine knows of a model."""

from abc import ABC, abstractmethod

from pace.cache import CacheShape, KVCache, Placement
from pace.cache.base import Ints
from pace.ops.registry import Dtype
from pace.reference.arrays import Array, Float


class Model(ABC):
    """An architecture with its weights. It keeps nothing of a sequence: keys and values are the cache's."""

    dtype: Dtype
    cache_shape: CacheShape
    vocabulary: int
    max_positions: int
    weight_bytes: int  # all that is kept
    bytes_per_step: int  # weights that one decode step reads

    @abstractmethod
    def forward(self, tokens: Ints, placement: Placement, cache: KVCache) -> Array:
        """Hidden states of new tokens, (tokens, hidden): those of all sequences end to end, as `placement` says."""

    @abstractmethod
    def logits(self, hidden: Array) -> Float:
        """(rows, vocabulary) float32, for the rows asked for."""
