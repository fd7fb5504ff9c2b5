"""SLAB_POOL: one allocation for all layers and sequences, cut into blocks that are handed out from a free list.

A block holds the keys or values of `block_tokens` tokens of all heads of a layer, head by head; the same block number
serves every layer. Allocating and freeing a block is popping and pushing its number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pace import host
from pace.ops import Attention, OperatorConfig
from pace.reference.arrays import Array
from pace.reference.store_kv import kv_shapes

from .base import CacheFull, CacheShape, CacheStats, KVCache, Placement

BLOCK_TOKENS = (256, 128, 64, 32)


def block_tokens_for(shape: CacheShape, l2_bytes: int) -> int:
    """The largest block whose keys and values, of the one head that a work item reads, fit a quarter of L2."""
    per_token = 2 * shape.head_dim * shape.dtype.itemsize
    return next((tokens for tokens in BLOCK_TOKENS if tokens * per_token <= l2_bytes // 4), BLOCK_TOKENS[-1])


@dataclass
class _Sequence:
    length: int = 0
    blocks: list[int] = field(default_factory=list)


class SlabPool(KVCache):
    """A block belongs to one sequence; `fork` copies."""

    def __init__(
        self, shape: CacheShape, capacity_bytes: int, operators: OperatorConfig, block_tokens: int | None = None
    ) -> None:
        self.shape = shape
        self.block_tokens = block_tokens or block_tokens_for(shape, host.describe().l2_bytes or 512 * 1024)
        self._block_bytes = shape.bytes_per_token * self.block_tokens
        self.num_blocks = capacity_bytes // self._block_bytes
        if self.num_blocks < 1:
            raise ValueError(f"kv_cache_bytes is {capacity_bytes}; one block of this model takes {self._block_bytes}")
        k_shape, v_shape = kv_shapes(self.num_blocks, shape.kv_heads, self.block_tokens, shape.head_dim, shape.dtype)
        self._k = np.zeros((shape.num_layers, *k_shape), shape.dtype)  # the system gives the pages when first written
        self._v = np.zeros((shape.num_layers, *v_shape), shape.dtype)
        self._free = list(range(self.num_blocks))[::-1]
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._attention = Attention(operators, shape.dtype)

    def allocate(self) -> int:
        self._next += 1
        self._sequences[self._next] = _Sequence()
        return self._next

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> Placement:
        held = [self._sequences[sequence] for sequence in sequences]
        lengths = [sequence.length + count for sequence, count in zip(held, counts, strict=True)]
        wanted = [self._blocks_of(length) - len(each.blocks) for each, length in zip(held, lengths, strict=True)]
        self._require(sum(wanted))
        for sequence, length, more in zip(held, lengths, wanted, strict=True):
            sequence.blocks += [self._free.pop() for _ in range(more)]
            sequence.length = length
        return self._place(held, np.asarray(counts, np.int32))

    def _blocks_of(self, length: int) -> int:
        return -(-length // self.block_tokens)

    def _require(self, blocks: int) -> None:
        if blocks > len(self._free):
            raise CacheFull(f"{blocks} blocks of {self.block_tokens} tokens are needed; {len(self._free)} are free")

    def _place(self, held: list[_Sequence], counts: np.ndarray) -> Placement:
        lengths = np.array([sequence.length for sequence in held], np.int32)
        tables = np.zeros((len(held), max((len(sequence.blocks) for sequence in held), default=0)), np.int32)
        for row, sequence in zip(tables, held, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        starts = np.zeros(len(held) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        owner = np.repeat(np.arange(len(held)), counts)
        positions = (np.arange(starts[-1]) + (lengths - starts[1:])[owner]).astype(np.int32)
        block, offset = np.divmod(positions, self.block_tokens)
        slots = tables[owner, block].astype(np.int64) * self.block_tokens + offset
        return Placement(positions, starts, lengths, tables, slots)

    def attend(self, layer: int, q: Array, k: Array, v: Array, placement: Placement, scale: float) -> Array:
        keys, values = self._k[layer], self._v[layer]
        self._attention.store(k, v, keys, values, placement.slots)
        attended: Array = self._attention.attend(
            q, keys, values, placement.block_tables, placement.starts, placement.lengths, scale
        )
        return attended

    def truncate(self, sequence: int, length: int) -> None:
        held = self._sequences[sequence]
        if not 0 <= length <= held.length:
            raise ValueError(f"length is {length}; sequence {sequence} has {held.length} tokens")
        keep = self._blocks_of(length)
        self._free += held.blocks[keep:][::-1]
        del held.blocks[keep:]
        held.length = length

    def fork(self, sequence: int) -> int:
        origin = self._sequences[sequence]
        self._require(len(origin.blocks))
        copies = [self._free.pop() for _ in origin.blocks]
        self._k[:, copies] = self._k[:, origin.blocks]
        self._v[:, copies] = self._v[:, origin.blocks]
        fork = self.allocate()
        self._sequences[fork] = _Sequence(origin.length, copies)
        return fork

    def free(self, sequence: int) -> None:
        self.truncate(sequence, 0)
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        return self._sequences[sequence].length

    def tokens_needed(self, num_tokens: int) -> int:
        return self._blocks_of(num_tokens) * self.block_tokens

    def stats(self) -> CacheStats:
        used_blocks = self.num_blocks - len(self._free)
        return CacheStats(
            used_tokens=sum(sequence.length for sequence in self._sequences.values()),
            capacity_tokens=self.num_blocks * self.block_tokens,
            used_bytes=used_blocks * self._block_bytes,
            capacity_bytes=self.num_blocks * self._block_bytes,
        )
