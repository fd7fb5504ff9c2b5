"""The protocol of every cache, and what crosses it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pace.ops import OperatorConfig
from pace.reference.arrays import Array, Float
from pace.reference.store_kv import GROUP

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Count = TypeVar("Count", int, Longs)


class CacheFull(RuntimeError):
    """There is no room for the tokens; nothing was written."""


@dataclass(frozen=True)
class CacheShape:
    """What a model keeps of each token, in every layer, and of how many tokens at most."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: np.dtype[np.generic]
    max_tokens: int  # of the longest sequence
    windows: tuple[int | None, ...] = ()  # how many keys each layer sees, None for all; () where all layers see all

    def __post_init__(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} layers; it must have {self.num_layers}, or none")
        for window in self.windows:
            if window is not None and (not isinstance(window, Integral) or window < 1):
                raise ValueError(f"windows has {window!r}; each must be an integer of at least 1, or None")

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, in all layers: of a token that no layer has given back."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class CacheStats:
    """How full a cache is, over all layers. With windows, sequences may have more tokens than its capacity."""

    used_tokens: int  # of all sequences; one that several share counts for each
    capacity_tokens: int  # of tokens in all layers
    used_bytes: int  # that sequences hold, full or not; what several share counts once
    capacity_bytes: int
    cached_bytes: int = 0  # that no sequence holds, kept for those to come; whoever needs the room gets it
    prefix_hits: int = 0  # sequences that began with tokens which were there already, since the cache was made
    prefix_tokens: int = 0  # how many tokens that were


@dataclass(frozen=True)
class Placement:
    """Where the new tokens of a batch go, and what each sees: made by append, used by attend in every layer.

    The tokens of all sequences stand end to end; those of the i-th are starts[i] … starts[i+1].
    """

    positions: Ints  # (tokens,) in their sequences
    starts: Ints  # (sequences + 1,)
    lengths: Ints  # (sequences,) with the new tokens
    block_tables: tuple[Ints, ...]  # of each group of layers, (sequences, blocks)
    slots: tuple[Longs, ...]  # of each group, (tokens,)
    spans: Ints | None = None  # (tokens, 2) positions that see each other in both directions; see reference.attend
    text_lengths: Ints | None = None  # (tokens,) of the texts that they belong to, where rotary positions follow them


class KVCache(ABC):
    """Keys and values of many sequences.

    A sequence is a number from allocate to free. append makes room for new tokens in all layers at once, or raises
    CacheFull and changes nothing; then attend, once a layer, writes their keys and values and reads all that there are.
    Tokens that have been appended and not been through every layer are taken back by truncate before anything else is
    asked of the cache. A number that is no sequence's is a ValueError.

    A layer with a window keeps what its next queries see: an append gives back what lies before the last `window`
    tokens that were there when it came, and nothing of its own. So it can always be taken back, in part or whole.

    Capacity is told in tokens of all layers, rounded up where it is needed and down where it is free.
    """

    @abstractmethod
    def __init__(
        self,
        shape: CacheShape,
        capacity_bytes: int,
        operators: OperatorConfig,
        block_tokens: int | None = None,
        prefix_caching: bool | None = None,
    ) -> None:
        """At most `capacity_bytes`, in blocks of `block_tokens` tokens, a multiple of 16 (None: the cache chooses).

        prefix_caching: whether `allocate` begins a sequence with what the cache has of its prompt; None where that is
        what the cache is for. ValueError where not even one block fits, or for prefixes that cannot be shared.
        """

    @abstractmethod
    def allocate(self, tokens: Sequence[int] | Ints | None = None) -> int:
        """A new sequence.

        It is empty, or begins with what the cache has of the prompt `tokens`, less than all of it: length() tells.
        """

    @abstractmethod
    def append(self, sequences: Sequence[int], counts: Sequence[int], tokens: Ints | None = None) -> Placement:
        """Room for counts[i] new tokens of sequences[i], each sequence once. CacheFull where there is none.

        tokens: their ids end to end, (sum of counts,), for others who begin with the same; None keeps them apart.
        Where keys and values do not follow from these ids and those before alone, as of images, the caller gives
        numbers from which they do.
        """

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        placement: Placement,
        scale: float,
        window: int | None = None,
        sinks: Float | None = None,
        softcap: float | None = None,
    ) -> Array:
        """Write k and v of the new tokens, then attend their q over the keys of their sequences.

        q: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim). Returns (tokens, heads, head_dim). window,
        sinks and softcap are those of pace.reference.attend. ValueError for a window larger than the shape's.
        """

    @abstractmethod
    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence but its first `length`.

        ValueError where it has fewer, and for lengths below `shortest`, but 0.
        """

    @abstractmethod
    def shortest(self, sequence: int) -> int:
        """The least that truncate can leave of a sequence, beside nothing: below, windows have given back too much."""

    def cut(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """truncate, of several sequences, each once."""
        for sequence, length in zip(sequences, lengths, strict=True):
            self.truncate(sequence, length)

    @abstractmethod
    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. CacheFull where there is no room."""

    @abstractmethod
    def free(self, sequence: int) -> None:
        """Give back all that a sequence holds. Its number may be another's from then on."""

    @abstractmethod
    def length(self, sequence: int) -> int:
        """How many tokens a sequence has."""

    @abstractmethod
    def tokens_needed(
        self,
        num_tokens: Count,
        prompt: Sequence[int] | Ints | None = None,
        forked_at: int | None = None,
        chunk: int | None = None,
    ) -> Count:
        """Capacity that a sequence takes at most by itself until it has num_tokens: they come in blocks. For several,
        an array of int64.

        chunk: the most tokens that one append brings (None: all of them), which windows have to hold beside what they
        see. Of a sequence that begins with `prompt`, or as a fork cut back to `forked_at` tokens, only what free_tokens
        would be less: not what living sequences hold of it.
        """

    @abstractmethod
    def tokens_to_come(self, sequences: Sequence[int], lengths: Longs, chunks: Longs) -> int:
        """Capacity that sequences may still take, at most, until they have these lengths, each by its own `chunk`."""

    @abstractmethod
    def held_tokens(self, sequences: Sequence[int]) -> int:
        """Capacity that sequences hold now; what several share counts for each."""

    @abstractmethod
    def free_tokens(self) -> int:
        """Capacity that sequences can still take, in tokens."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """How full the cache is now."""


def check_tokens(tokens: Sequence[int] | Array, count: int) -> Array:
    """As an array. TypeError unless they are integers, ValueError unless `count` ids that can be: 0 to 2^31 - 1."""
    tokens = np.asarray(tokens)
    if len(tokens) and tokens.dtype.kind not in "iu":
        raise TypeError(f"tokens has dtype {tokens.dtype}; it must be of integers")
    if tokens.shape != (count,):
        raise ValueError(f"tokens has shape {tokens.shape}; it must be ({count},)")
    fits = tokens.dtype == np.int32 or not count or tokens.max() < 2**31  # an int32 does: the engine's, at every step
    if count and not (fits and tokens.min() >= 0):
        raise ValueError(f"tokens has {tokens.min()} … {tokens.max()}; it must be 0 … {2**31 - 1}")
    return tokens


def check_block_tokens(block_tokens: int) -> int:
    """ValueError unless it is a positive multiple of 16."""
    if block_tokens < GROUP or block_tokens % GROUP:
        raise ValueError(f"block_tokens is {block_tokens}; it must be a multiple of {GROUP}")
    return block_tokens
