"""The protocol of every cache, and what crosses it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pace.ops import OperatorConfig
from pace.reference.arrays import Array

Ints = NDArray[np.int32]


class CacheFull(RuntimeError):
    """There is no room for the tokens; nothing was written."""


@dataclass(frozen=True)
class CacheShape:
    """What a model keeps of each token, in every layer."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: np.dtype[np.generic]

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, in all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class CacheStats:
    """How full a cache is, over all layers."""

    used_tokens: int  # of all sequences
    capacity_tokens: int
    used_bytes: int  # of blocks that sequences hold, full or not
    capacity_bytes: int


@dataclass(frozen=True)
class Placement:
    """Where the new tokens of a batch go, and what each sees: made by append, used by attend in every layer.

    The tokens of all sequences stand end to end; those of the i-th are starts[i] … starts[i+1].
    """

    positions: Ints  # (tokens,) in their sequences
    starts: Ints  # (sequences + 1,)
    lengths: Ints  # (sequences,) with the new tokens
    block_tables: Ints  # (sequences, blocks)
    slots: NDArray[np.int64]  # (tokens,)


class KVCache(ABC):
    """Keys and values of many sequences.

    A sequence is a number from allocate to free. append makes room for new tokens in all layers at once, or raises
    CacheFull and changes nothing; then attend, once a layer, writes their keys and values and reads all that there are.
    """

    @abstractmethod
    def __init__(
        self, shape: CacheShape, capacity_bytes: int, operators: OperatorConfig, block_tokens: int | None = None
    ) -> None:
        """At most `capacity_bytes`, in blocks of `block_tokens` tokens, a multiple of 16 (None: the cache chooses).

        ValueError where not even one block fits.
        """

    @abstractmethod
    def allocate(self) -> int:
        """A new, empty sequence."""

    @abstractmethod
    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> Placement:
        """Room for counts[i] new tokens of sequences[i]. CacheFull where there is none."""

    @abstractmethod
    def attend(self, layer: int, q: Array, k: Array, v: Array, placement: Placement, scale: float) -> Array:
        """Write k and v of the new tokens, then attend their q over all keys of their sequences.

        q: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim). Returns (tokens, heads, head_dim).
        """

    @abstractmethod
    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence but its first `length`. ValueError where it has fewer."""

    @abstractmethod
    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. CacheFull where there is no room."""

    @abstractmethod
    def free(self, sequence: int) -> None:
        """Give back all that a sequence holds. Its number is no sequence's from then on."""

    @abstractmethod
    def length(self, sequence: int) -> int:
        """How many tokens a sequence has."""

    @abstractmethod
    def tokens_needed(self, num_tokens: int) -> int:
        """Capacity that a sequence of num_tokens takes, in tokens: they come in blocks."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """How full the cache is now."""
