"""What the caches share: one memory cut into blocks, and the tables that say which blocks a sequence holds.

A block holds `block_tokens` tokens of one sequence, keys and values, in the layers of one group: all layers, where no
windows differ. A sequence has a row of the tables for each group, its blocks in the order of its tokens; its number
counts these rows. A group with a window has given back its first blocks, as many as `_kept` says, and their numbers in
the tables mean nothing; they are never read, as no query sees them. What an append does, it does for all sequences,
groups, blocks and tokens at once.
"""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pace.ops import Attention, OperatorConfig
from pace.reference.arrays import Array, Float
from pace.reference.store_kv import GROUP, kv_shapes

from .base import CacheFull, CacheShape, CacheStats, Count, Ints, KVCache, Longs, Placement, check_tokens
from .memory import Memory
from .windows import Groups

ENDED = -1  # the length of what is no sequence


class BlockCache(KVCache):
    """Room is counted in parts: a token in all layers is `parts`, as many as there are groups, or layers, that may hold
    it or not. `capacity` is what sequences may hold.
    """

    def __init__(
        self,
        shape: CacheShape,
        operators: OperatorConfig,
        groups: Groups,
        block_tokens: int,
        num_blocks: int,
        parts: int,
        part_bytes: int,
        capacity: int,
        huge_pages: bool,
    ) -> None:
        self.shape, self.block_tokens, self.num_blocks = shape, block_tokens, num_blocks
        self.groups, self._num_groups = groups, len(groups.windows)
        self.parts, self.part_bytes, self.capacity = parts, part_bytes, capacity
        layer_bytes = block_tokens * shape.bytes_per_token // max(shape.num_layers, 1)
        self.block_bytes = layer_bytes * groups.layers
        self._memory = Memory(num_blocks * self.block_bytes, huge_pages)
        # The order of the axes is the order in memory, and it is decided here alone.
        self._blocks = self._memory.bytes.view(shape.dtype).reshape(
            num_blocks, groups.layers, 2, shape.kv_heads, block_tokens // GROUP, GROUP * shape.head_dim
        )
        k_shape, v_shape = kv_shapes(num_blocks, shape.kv_heads, block_tokens, shape.head_dim, shape.dtype)
        self._layers = [
            (group, self._blocks[:, place, 0].reshape(k_shape), self._blocks[:, place, 1].reshape(v_shape))
            for group, place in groups.places
        ]
        self._seen = shape.windows or (None,) * shape.num_layers
        self._attention = Attention(operators, shape.dtype)
        self._free = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # a stack, its top at _num_free
        self._num_free = num_blocks
        self._lengths = np.zeros(0, np.int64)  # of each sequence
        self._tables = np.zeros((0, 1), np.int32)  # of each sequence and group; past its blocks numbers mean nothing
        self._windows = np.zeros(0, np.int64)  # those that there are, of groups or of layers
        self._window_tokens = block_tokens  # what a window takes and gives back at once
        self._kept = np.zeros((0, 0), np.int64)  # of each window and sequence: how many of these it has given back
        self._ended: list[int] = []  # rows that are no sequence's, the next one last

    # --- what the caches differ in ---

    @abstractmethod
    def free_parts(self) -> int:
        """Parts that sequences can still take."""

    @abstractmethod
    def parts_needed(self, lengths: Count, chunk: int | None) -> Count:
        """Parts that sequences of these lengths take at most; see tokens_needed."""

    @abstractmethod
    def _make_room(self, rows: Longs, grown: Longs, blocks: int, kept: Longs) -> None:
        """CacheFull unless the sequences can grow to the lengths `grown`, which takes so many blocks more; windows give
        back what `kept` says, (windows, sequences).
        """

    @abstractmethod
    def _drop(self, sequence: int, before: int, length: int) -> None:
        """Give back what a sequence of length `before` holds past `length`."""

    def _take(self, count: int) -> Ints:
        """That many blocks, which there are. It is a view of the free stack, good until blocks are given back."""
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count][::-1]

    def _give(self, blocks: Ints) -> None:
        """Blocks of one sequence back, in its order."""
        self._free[self._num_free : self._num_free + len(blocks)] = blocks[::-1]
        self._num_free += len(blocks)

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
        blocks = int(more.sum()) * self._num_groups
        kept = self._kept_after(rows, lengths, grown) if len(self._windows) else self._kept
        self._make_room(rows, grown, blocks, kept)
        if blocks and self._num_groups == 1:
            self._fill_tables(rows, held, more, self._take(blocks))
        elif blocks:
            each = self._num_groups
            lines = np.concatenate(self._lines(rows))
            self._fill_tables(lines, np.tile(held, each), np.tile(more, each), self._take(blocks))
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
        group, keys, values = self._layers[layer]
        limit = self._seen[layer]
        if limit is not None and (window is None or window > limit):
            raise ValueError(f"window is {window}; layer {layer} of this cache holds what a window of {limit} sees")
        self._attention.store(k, v, keys, values, placement.slots[group])
        attended: Array = self._attention.attend(
            q,
            keys,
            values,
            placement.block_tables[group],
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
        if 0 < length < self.shortest(sequence):
            raise ValueError(
                f"length is {length}; of sequence {sequence}, windows hold what lengths from "
                f"{self.shortest(sequence)} to {before} need: cut it to one of these, or to 0"
            )
        self._drop(sequence, before, length)
        if length == 0:
            self._kept[:, sequence] = 0
        self._lengths[sequence] = length

    def cut(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        rows, after = self._rows_of(sequences), np.array(lengths, np.int64)
        before = self._lengths[rows]
        # Most are cut by less than they hold beyond need, and give nothing back.
        stay = self._hold_alike(before, after) & (after > 0) & (self._shortest(rows) <= after) & (after <= before)
        self._lengths[rows[stay]] = after[stay]
        super().cut(rows[~stay].tolist(), after[~stay].tolist())

    def shortest(self, sequence: int) -> int:
        self.length(sequence)
        return int(self._shortest(np.array([sequence]))[0])

    def _shortest(self, rows: Longs) -> Longs:
        kept = self._kept[:, rows]
        least: Longs = np.where(kept > 0, kept * self._window_tokens + self._windows[:, None], 0).max(axis=0, initial=0)
        return least

    def free(self, sequence: int) -> None:
        self.truncate(sequence, 0)
        self._lengths[sequence] = ENDED
        self._ended.append(sequence)

    def length(self, sequence: int) -> int:
        if not 0 <= sequence < len(self._lengths) or self._lengths[sequence] == ENDED:
            raise ValueError(f"sequence {sequence} is not in the cache")
        return int(self._lengths[sequence])

    def free_tokens(self) -> int:
        return self.free_parts() // self.parts

    def tokens_needed(
        self,
        num_tokens: Count,
        prompt: Sequence[int] | Ints | None = None,
        forked_at: int | None = None,
        chunk: int | None = None,
    ) -> Count:
        return self._in_tokens(self.parts_needed(num_tokens, chunk))

    def stats(self) -> CacheStats:
        return CacheStats(
            used_tokens=int(self._lengths[self._lengths > 0].sum()),
            capacity_tokens=self.capacity // self.parts,
            used_bytes=(self.capacity - self.free_parts()) * self.part_bytes,
            capacity_bytes=self.capacity * self.part_bytes,
        )

    # --- the work ---

    def _hold_alike(self, before: Longs, after: Longs) -> NDArray[np.bool_]:
        """Where sequences of these lengths hold the same."""
        alike: NDArray[np.bool_] = self._blocks_of(before) == self._blocks_of(after)
        return alike

    def _blocks_of(self, lengths: Count) -> Count:
        return -(-lengths // self.block_tokens)

    def _lines(self, rows: Longs) -> tuple[Longs, ...]:
        """The rows of the tables, of each group."""
        each = self._num_groups
        return (rows,) if each == 1 else tuple(rows * each + group for group in range(each))

    def _in_tokens(self, parts: Count) -> Count:
        return -(-parts // self.parts)

    def _require(self, parts: int) -> None:
        if parts > self.free_parts():
            raise CacheFull(
                f"room for {self._in_tokens(parts)} more tokens is needed; "
                f"{self.free_tokens()} of {self.capacity // self.parts} are free"
            )

    def _kept_after(self, rows: Longs, lengths: Longs, grown: Longs) -> Longs:
        """What windows will have given back when sequences have grown, (windows, sequences).

        Only those that take something give something back, so that a sequence which goes on token by token holds the
        same all the time.
        """
        tokens, kept = self._window_tokens, self._kept[:, rows]
        takes = -(-grown // tokens) > -(-lengths // tokens)
        outside = np.maximum(lengths - self._windows[:, None], 0) // tokens
        return np.where(takes, np.maximum(kept, outside), kept)

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
        self._tables = np.pad(self._tables, ((0, more * self._num_groups), (0, 0)))
        self._kept = np.pad(self._kept, ((0, 0), (0, more)))
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
        _strips(self._tables.reshape(-1), width)[rows * self._tables.shape[1] + held] = _strips(padded, width)[first]

    def _place(self, rows: Longs, added: Longs, lengths: Longs) -> Placement:
        starts = np.zeros(len(rows) + 1, np.int32)
        added.cumsum(out=starts[1:])
        columns = self._blocks_of(int(lengths.max(initial=0)))
        tables = tuple(self._tables[lines, :columns] for lines in self._lines(rows))
        owner = np.arange(len(rows)).repeat(added)
        positions = np.arange(starts[-1]) + (lengths - starts[1:])[owner]
        block, offset = np.divmod(positions, self.block_tokens)
        slots = tuple(table[owner, block].astype(np.int64) * self.block_tokens + offset for table in tables)
        return Placement(positions.astype(np.int32), starts, lengths.astype(np.int32), tables, slots)


def _strips(array: Ints, width: int) -> Ints:
    """(…, width): row i is array[i : i + width]. NumPy's sliding_window_view, at a tenth of its cost."""
    return np.ndarray((len(array) - width + 1, width), array.dtype, array, strides=2 * array.strides)
