"""What the caches share: one memory cut into blocks, and the tables that say which blocks a sequence holds.

A block holds `block_tokens` tokens of one sequence, keys and values, in all layers. A sequence of n tokens holds
⌈n / block_tokens⌉ blocks, those of its row of the tables, and its number is that row. What an append does, it does for
all sequences, blocks and tokens at once.
"""

from collections.abc import Sequence

import numpy as np

from pace.ops import Attention, OperatorConfig
from pace.reference.arrays import Array, Float
from pace.reference.store_kv import GROUP, kv_shapes

from .base import CacheFull, CacheShape, CacheStats, Count, Ints, KVCache, Longs, Placement, check_tokens
from .memory import Memory

ENDED = -1  # the length of what is no sequence


class BlockCache(KVCache):
    """`capacity_tokens` is what sequences may hold, `room_for` what one of them holds."""

    def __init__(
        self,
        shape: CacheShape,
        operators: OperatorConfig,
        block_tokens: int,
        num_blocks: int,
        capacity_tokens: int,
        huge_pages: bool,
    ) -> None:
        self.shape, self.block_tokens, self.num_blocks = shape, block_tokens, num_blocks
        self.capacity_tokens = capacity_tokens
        self.block_bytes = block_tokens * shape.bytes_per_token
        self._memory = Memory(num_blocks * self.block_bytes, huge_pages)
        # The order of the axes is the order in memory, and it is decided here alone.
        self._blocks = self._memory.bytes.view(shape.dtype).reshape(
            num_blocks, shape.num_layers, 2, shape.kv_heads, block_tokens // GROUP, GROUP * shape.head_dim
        )
        k_shape, v_shape = kv_shapes(num_blocks, shape.kv_heads, block_tokens, shape.head_dim, shape.dtype)
        self._layers = [
            (self._blocks[:, layer, 0].reshape(k_shape), self._blocks[:, layer, 1].reshape(v_shape))
            for layer in range(shape.num_layers)
        ]
        self._attention = Attention(operators, shape.dtype)
        self._free = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # a stack, its top at _num_free
        self._num_free = num_blocks
        self._lengths = np.zeros(0, np.int64)  # of each sequence
        self._tables = np.zeros((0, 1), np.int32)  # of each sequence; past its blocks numbers mean nothing
        self._ended: list[int] = []  # rows that are no sequence's, the next one last

    # --- what the caches differ in ---

    def room_for(self, lengths: Count) -> Count:
        """Tokens of capacity that sequences of these lengths hold."""
        return self._blocks_of(lengths) * self.block_tokens

    def _take(self, count: int) -> Ints:
        """That many blocks, which there are. It is a view of the free stack, good until blocks are given back."""
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count][::-1]

    def _give(self, blocks: Ints) -> None:
        """Blocks of one sequence back, in its order."""
        self._free[self._num_free : self._num_free + len(blocks)] = blocks[::-1]
        self._num_free += len(blocks)

    def _make_room(self, rows: Longs, grown: Longs, blocks: int) -> None:
        """CacheFull unless the sequences can grow to the lengths `grown`, which takes so many blocks more."""
        self._require(blocks * self.block_tokens)

    # --- the protocol ---

    def allocate(self, tokens: Sequence[int] | Ints | None = None) -> int:
        if not self._ended:
            self._more_rows()
        sequence = self._ended.pop()
        self._lengths[sequence] = 0
        return sequence

    def append(self, sequences: Sequence[int], counts: Sequence[int], tokens: Ints | None = None) -> Placement:
        rows, added = self._rows_of(sequences), np.array(counts, np.int64)
        if len(added) != len(rows) or added.min(initial=0) < 0:
            raise ValueError(f"counts is {counts}; it must be {len(rows)} numbers of tokens, none below 0")
        if tokens is not None:
            check_tokens(tokens, int(added.sum()))
        lengths = self._lengths[rows]
        grown = lengths + added
        self._check_longest(rows, grown)
        held = self._blocks_of(lengths)
        more = self._blocks_of(grown) - held
        blocks = int(more.sum())
        self._make_room(rows, grown, blocks)
        if blocks:
            self._fill_tables(rows, held, more, self._take(blocks))
        self._lengths[rows] = grown
        return self._place(rows, added, grown)

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
        keys, values = self._layers[layer]
        self._attention.store(k, v, keys, values, placement.slots)
        attended: Array = self._attention.attend(
            q,
            keys,
            values,
            placement.block_tables,
            placement.starts,
            placement.lengths,
            scale,
            window=window,
            sinks=sinks,
            softcap=softcap,
            spans=placement.spans,
        )
        return attended

    def truncate(self, sequence: int, length: int) -> None:
        before = self.length(sequence)
        if not 0 <= length <= before:
            raise ValueError(f"length is {length}; sequence {sequence} has {before} tokens")
        self._give(self._tables[sequence, self._blocks_of(length) : self._blocks_of(before)])
        self._lengths[sequence] = length

    def cut(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        rows, after = self._rows_of(sequences), np.array(lengths, np.int64)
        before = self._lengths[rows]
        # Most are cut by less than they hold beyond need, and give nothing back.
        stay = (self.room_for(after) == self.room_for(before)) & (after >= 0) & (after <= before)
        self._lengths[rows[stay]] = after[stay]
        super().cut(rows[~stay].tolist(), after[~stay].tolist())

    def fork(self, sequence: int) -> int:
        length, blocks = self.length(sequence), self._blocks_held(sequence)
        self._require(self.room_for(length))
        copies = self._take(len(blocks))
        for i, (block, copy) in enumerate(zip(blocks, copies, strict=True)):
            self._copy(block, copy, min(length - i * self.block_tokens, self.block_tokens))
        return self._begin(copies, length)

    def free(self, sequence: int) -> None:
        self.truncate(sequence, 0)
        self._lengths[sequence] = ENDED
        self._ended.append(sequence)

    def length(self, sequence: int) -> int:
        if not 0 <= sequence < len(self._lengths) or self._lengths[sequence] == ENDED:
            raise ValueError(f"sequence {sequence} is not in the cache")
        return int(self._lengths[sequence])

    def free_tokens(self) -> int:
        return self._num_free * self.block_tokens

    def tokens_needed(
        self, num_tokens: Count, prompt: Sequence[int] | Ints | None = None, forked_at: int | None = None
    ) -> Count:
        return self.room_for(num_tokens)

    def stats(self) -> CacheStats:
        per_token = self.shape.bytes_per_token
        return CacheStats(
            used_tokens=int(self._lengths[self._lengths > 0].sum()),
            capacity_tokens=self.capacity_tokens,
            used_bytes=(self.capacity_tokens - self.free_tokens()) * per_token,
            capacity_bytes=self.capacity_tokens * per_token,
        )

    # --- the work ---

    def _blocks_of(self, lengths: Count) -> Count:
        return -(-lengths // self.block_tokens)

    def _blocks_held(self, sequence: int) -> Ints:
        blocks: Ints = self._tables[sequence, : self._blocks_of(self.length(sequence))]
        return blocks

    def _require(self, num_tokens: int) -> None:
        if num_tokens > self.free_tokens():
            raise CacheFull(
                f"room for {num_tokens} more tokens is needed; {self.free_tokens()} of {self.capacity_tokens} are free"
            )

    def _rows_of(self, sequences: Sequence[int]) -> Longs:
        rows = np.array(sequences, np.int64)
        if (rows.view(np.uint64) >= len(self._lengths)).any() or self._lengths[rows].min(initial=0) == ENDED:
            for sequence in sequences:
                self.length(sequence)
        if len(set(sequences)) < len(rows):
            raise ValueError(f"sequences are {list(sequences)}; each can be appended to once")
        return rows

    def _check_longest(self, rows: Longs, lengths: Longs) -> None:
        if lengths.max(initial=0) > self.shape.max_tokens:
            row = int(lengths.argmax())
            raise ValueError(
                f"sequence {rows[row]} would have {lengths[row]} tokens; the longest may have {self.shape.max_tokens}"
            )

    def _more_rows(self) -> None:
        rows = len(self._lengths)
        more = max(rows, 16)
        self._lengths = np.append(self._lengths, np.full(more, ENDED, np.int64))
        self._tables = np.pad(self._tables, ((0, more), (0, 0)))
        self._ended += range(rows, rows + more)[::-1]

    def _widen_tables(self, columns: int) -> None:
        width = self._tables.shape[1]
        if columns > width:
            self._tables = np.pad(self._tables, ((0, 0), (0, max(columns, 2 * width) - width)))

    def _fill_tables(self, rows: Longs, held: Longs, more: Longs, blocks: Ints) -> None:
        """The next more[i] of the blocks into row rows[i], past the held[i] that it has.

        In one copy, every row is given as many as the one that gets most; past its blocks a number means nothing.
        """
        width = int(more.max())
        self._widen_tables(int(held.max()) + width)
        first = more.cumsum() - more
        padded = np.concatenate((blocks, np.zeros(width, np.int32)))
        _windows(self._tables.reshape(-1), width)[rows * self._tables.shape[1] + held] = _windows(padded, width)[first]

    def _place(self, rows: Longs, added: Longs, lengths: Longs) -> Placement:
        starts = np.zeros(len(rows) + 1, np.int32)
        added.cumsum(out=starts[1:])
        tables = self._tables[rows, : self._blocks_of(int(lengths.max(initial=0)))]
        owner = np.arange(len(rows)).repeat(added)
        positions = np.arange(starts[-1]) + (lengths - starts[1:])[owner]
        block, offset = np.divmod(positions, self.block_tokens)
        slots = tables[owner, block].astype(np.int64) * self.block_tokens + offset
        return Placement(positions.astype(np.int32), starts, lengths.astype(np.int32), tables, slots)

    def _begin(self, blocks: Ints, length: int) -> int:
        """A new sequence of these blocks."""
        sequence = BlockCache.allocate(self)
        self._widen_tables(len(blocks))
        self._tables[sequence, : len(blocks)] = blocks
        self._lengths[sequence] = length
        return sequence

    def _copy(self, block: int, copy: int, num_tokens: int) -> None:
        """The first tokens of a block into another, in whole groups."""
        groups = -(-num_tokens // GROUP)
        self._blocks[copy, ..., :groups, :] = self._blocks[block, ..., :groups, :]


def _windows(array: Ints, width: int) -> Ints:
    """(…, width): row i is array[i : i + width]. NumPy's sliding_window_view, at a tenth of its cost."""
    return np.ndarray((len(array) - width + 1, width), array.dtype, array, strides=2 * array.strides)


def blocks_within(shape: CacheShape, capacity_bytes: int, block_tokens: int) -> int:
    """How many blocks that is. ValueError where it is none."""
    block_bytes = block_tokens * shape.bytes_per_token
    if capacity_bytes < block_bytes:
        raise ValueError(f"kv_cache_bytes is {capacity_bytes}; one block of this model takes {block_bytes}")
    return capacity_bytes // block_bytes
