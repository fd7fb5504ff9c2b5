"""Blocks that sequences share, whether they were forked or begin with the same tokens: what PAGED and SLAB_POOL are.

A block is written by whoever alone holds it; of one that others hold too, a sequence that goes on in it first gets a
copy of its own. The index knows full blocks by what stands in them: the digest of a block is that of its token ids and
of the digest before it, so equal digests are equal beginnings; each group of layers has its block of them. The index
holds a block as a sequence does. A block
that nobody else holds is idle; it stays for whoever begins with the same tokens, until its room is needed. The one
that has been idle for longest goes first, and no block before those that follow on it.

All groups draw from one pool, whatever they see. A prompt begins with as much as every group still has what it sees
next: those without a window all of it, the others the last blocks.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import cast

import numpy as np

from pace.ops import OperatorConfig

from .base import CacheShape, CacheStats, Count, Ints, Longs, Placement, check_tokens
from .blocks import BlockCache
from .windows import deal, lesser, most_blocks

Key = tuple[bytes | None, int]  # a digest, and the group
UNKNOWN = -1  # a token whose id was not given


class SharedBlocks(BlockCache):
    """`fork` shares all blocks; with prefix_caching, `allocate` those that hold the beginning of the prompt."""

    def __init__(
        self,
        shape: CacheShape,
        capacity_bytes: int,
        operators: OperatorConfig,
        block_tokens: int,
        prefix_caching: bool,
    ) -> None:
        groups = deal(shape)
        part_bytes = groups.layers * (shape.bytes_per_token // shape.num_layers)
        block_bytes, each = block_tokens * part_bytes, len(groups.windows)
        if capacity_bytes < block_bytes * each:
            raise ValueError(f"kv_cache_bytes is {capacity_bytes}; one block of this model takes {block_bytes * each}")
        num_blocks = capacity_bytes // block_bytes
        capacity = num_blocks * block_tokens
        super().__init__(
            shape, operators, groups, block_tokens, num_blocks, each, part_bytes, capacity, huge_pages=True
        )
        self._windows = np.array([window for window in groups.windows if window], np.int64)
        self._kept = np.zeros((len(self._windows), 0), np.int64)
        self.prefix_caching = prefix_caching
        self._sharers = np.zeros(num_blocks, np.int32)  # who hold a block, sequences and the index, beyond the first
        self._num_shared = 0  # the sum of _sharers: without any, blocks come and go as if each were somebody's own
        self._tokens = np.zeros((num_blocks, block_tokens), np.int32)
        self._index: dict[Key, int] = {}
        self._digests: dict[int, Key] = {}  # of the blocks that the index holds
        self._chains: dict[int, list[bytes | None]] = {}  # the digests of sequences; None from what was not given on
        self._is_known = np.zeros(num_blocks, bool)  # whether the index holds a block
        self._idle: OrderedDict[int, None] = OrderedDict()  # those that it alone holds, the longest idle first
        self._prefix_hits = self._prefix_tokens = 0

    def allocate(self, tokens: Sequence[int] | Ints | None = None) -> int:
        if tokens is None or not self.prefix_caching:
            return super().allocate()
        digests, tables, kept = self._beginning(tokens)
        sequence = super().allocate()
        length = len(digests) * self.block_tokens
        self._begin(sequence, tables, kept, length)
        self._chains[sequence] = list(digests)
        self._prefix_hits += length > 0
        self._prefix_tokens += length
        return sequence

    def append(self, sequences: Sequence[int], counts: Sequence[int], tokens: Ints | None = None) -> Placement:
        placement = super().append(sequences, counts, tokens)
        if self.prefix_caching:
            self._tokens.reshape(-1)[placement.slots[0]] = UNKNOWN if tokens is None else tokens
        return placement

    def fork(self, sequence: int) -> int:
        length = self.length(sequence)
        fork = super().allocate()
        tables = self._tables_of(sequence)[:, : self._blocks_of(length)].copy()
        self._begin(fork, tables, self._kept[:, sequence].copy(), length)
        self._chains[fork] = self._chains.get(sequence, [])[:]
        return fork

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        del self._chains.get(sequence, [])[length // self.block_tokens :]

    def free(self, sequence: int) -> None:
        self.length(sequence)
        if self.prefix_caching:
            self._register(sequence)
        super().free(sequence)
        self._chains.pop(sequence, None)

    def parts_needed(self, lengths: Count, chunk: int | None) -> Count:
        blocks = self._blocks_of(lengths) * self.groups.num_full
        for window in self._windows.tolist():
            blocks = blocks + most_blocks(lengths, chunk, window, self.block_tokens)
        return blocks * self.block_tokens

    def tokens_needed(
        self,
        num_tokens: Count,
        prompt: Sequence[int] | Ints | None = None,
        forked_at: int | None = None,
        chunk: int | None = None,
    ) -> Count:
        if forked_at is not None:
            begun, idle = forked_at // self.block_tokens, np.zeros(self._num_groups, np.int64)
        elif prompt is not None and self.prefix_caching:
            digests, tables, kept = self._beginning(prompt)
            begun = len(digests)
            held = np.arange(begun) >= self._first_blocks(kept)[:, None]
            idle = (held & self._is_known[tables] & (self._sharers[tables] == 0)).sum(axis=1)
        else:
            return super().tokens_needed(num_tokens, chunk=chunk)
        # What others hold of its beginning does not come free when a window leaves it; the rest is taken or was idle.
        more = self._blocks_of(num_tokens) - begun
        blocks = more * self.groups.num_full + int(idle[: self.groups.num_full].sum())
        for window, others in zip(self._windows.tolist(), idle[self.groups.num_full :].tolist(), strict=True):
            blocks = blocks + lesser(more + others, most_blocks(num_tokens, chunk, window, self.block_tokens))
        return self._in_tokens(blocks * self.block_tokens)

    def tokens_to_come(self, sequences: Sequence[int], lengths: Longs, chunks: Longs) -> int:
        rows = np.array(sequences, np.int64)
        before = self._lengths[rows]
        more = np.maximum(self._blocks_of(lengths) - self._blocks_of(before), 0)
        if self._num_shared:  # a block that is gone on in may have to be copied; as much in each group
            tails = self._tables[self._lines(rows)[0], (before - 1) // self.block_tokens]
            shared = self._sharers[tails] > self._is_known[tails]
            more += shared & (before % self.block_tokens > 0) & (lengths > before)
        blocks = int(more.sum()) * self.groups.num_full
        for i, window in enumerate(self._windows.tolist()):
            most = most_blocks(lengths, chunks, window, self.block_tokens)
            blocks += int(np.minimum(more, np.maximum(most - self._alone(i, rows), 0)).sum())
        return self._in_tokens(blocks * self.block_tokens)

    def _alone(self, window: int, rows: Longs) -> Longs:
        """How many blocks of a window each sequence holds alone: those come free when the window leaves them."""
        kept, ends = self._kept[window, rows], self._blocks_of(self._lengths[rows])
        if not self._num_shared:
            return cast(Longs, ends - kept)
        columns = kept[:, None] + np.arange((ends - kept).max(initial=0))
        held = columns < ends[:, None]
        lines = rows * self._num_groups + self.groups.num_full + window
        blocks = self._tables[lines[:, None], np.where(held, columns, 0)]
        return cast(Longs, (held & (self._sharers[blocks] == self._is_known[blocks])).sum(axis=1))

    def held_tokens(self, sequences: Sequence[int]) -> int:
        rows = np.array(sequences, np.int64)
        blocks = int(self._blocks_of(self._lengths[rows]).sum()) * self._num_groups - int(self._kept[:, rows].sum())
        return blocks * self.block_tokens // self.parts

    def stats(self) -> CacheStats:
        return replace(
            super().stats(),
            cached_bytes=len(self._idle) * self.block_bytes,
            prefix_hits=self._prefix_hits,
            prefix_tokens=self._prefix_tokens,
        )

    # --- blocks and their holders ---

    def free_parts(self) -> int:
        return (self._num_free + len(self._idle)) * self.block_tokens

    def _tables_of(self, sequence: int) -> Ints:
        """Of each group, (groups, columns)."""
        each = self._num_groups
        return self._tables[sequence * each : (sequence + 1) * each]

    def _first_blocks(self, kept: Longs) -> Longs:
        """Of each group, the first block that a sequence still holds."""
        return np.concatenate((np.zeros(self.groups.num_full, np.int64), kept))

    def _blocks_held(self, sequence: int) -> Ints:
        """In the order of the tokens; those of the same tokens stand together."""
        return self._held_between(sequence, 0, self._blocks_of(self.length(sequence)))

    def _held_between(self, sequence: int, begin: int, end: int) -> Ints:
        tables = self._tables_of(sequence)[:, begin:end]
        if not len(self._windows):
            return tables.T.reshape(-1)
        held = np.arange(begin, end) >= self._first_blocks(self._kept[:, sequence])[:, None]
        blocks: Ints = tables.T[held.T]
        return blocks

    def _begin(self, sequence: int, tables: Ints, kept: Longs, length: int) -> None:
        """An empty sequence holds these blocks too, as others do."""
        self._widen_tables(tables.shape[1])
        self._tables_of(sequence)[:, : tables.shape[1]] = tables
        self._kept[:, sequence], self._lengths[sequence] = kept, length
        self._share(self._blocks_held(sequence))

    def _drop(self, sequence: int, before: int, length: int) -> None:
        self._give(self._held_between(sequence, self._blocks_of(length), self._blocks_of(before)))

    def _take(self, count: int) -> Ints:
        while self._num_free < count:
            self._forget(next(iter(self._idle)))
        return super()._take(count)

    def _share(self, blocks: Ints) -> None:
        """One more sequence holds them."""
        self._sharers[blocks] += 1
        self._num_shared += len(blocks)
        for block in blocks.tolist() if self._idle else ():
            self._idle.pop(block, None)

    def _give(self, blocks: Ints) -> None:
        if not self._num_shared:
            super()._give(blocks)
            return
        alone = self._sharers[blocks] == 0
        super()._give(blocks[alone])
        shared = blocks[~alone]
        self._sharers[shared] -= 1
        self._num_shared -= len(shared)
        for block in shared[::-1].tolist():  # the last first: no block goes before those that follow on it
            if self._sharers[block] == 0 and block in self._digests:
                self._idle[block] = None

    def _forget(self, block: int) -> None:
        """The index gives up a block, which may be idle."""
        self._idle.pop(block, None)
        del self._index[self._digests.pop(block)]
        self._is_known[block] = False
        self._give(np.array([block], np.int32))

    # --- copy on write ---

    def _make_room(self, rows: Longs, grown: Longs, blocks: int, kept: Longs) -> None:
        """Of each block that is gone on in, the sequence is the only holder afterwards."""
        left = self._left(rows, kept) if len(self._windows) else {}
        if not self._num_shared:
            self._require((blocks - sum(map(len, left.values()))) * self.block_tokens)
            self._leave(left, rows, kept)
            return
        lengths = self._lengths[rows]
        partial = (lengths % self.block_tokens > 0) & (grown > lengths)
        columns = (lengths - 1) // self.block_tokens
        tails = [self._tables[lines, columns] for lines in self._lines(rows)]
        shared = [partial & (self._sharers[each] > 0) for each in tails]
        writers = Counter(block for each, some in zip(tails, shared, strict=True) for block in each[some].tolist())
        # Where all who hold a block write to it, the last of them keeps it.
        copies = sum(count - (count == self._sequences_holding(block)) for block, count in writers.items())
        leavers = Counter(block for each in left.values() for block in each.tolist())
        freed = sum(count == self._sequences_holding(block) for block, count in leavers.items())
        self._require((blocks + copies - freed) * self.block_tokens)
        self._leave(left, rows, kept)
        for lines, some in zip(self._lines(rows), shared, strict=True):
            for i in np.flatnonzero(some).tolist():
                self._own(int(lines[i]), int(columns[i]))

    def _left(self, rows: Longs, kept: Longs) -> dict[int, Ints]:
        """The blocks that windows leave, of each sequence that has any."""
        before = self._kept[:, rows]
        left = {}
        for i in np.flatnonzero((kept > before).any(axis=0)).tolist():
            columns = np.arange(int(before[:, i].min()), int(kept[:, i].max()))
            leaves = (columns >= before[:, i, None]) & (columns < kept[:, i, None])
            tables = self._tables_of(int(rows[i]))[self.groups.num_full :]
            left[int(rows[i])] = tables[:, columns].T[leaves.T]
        return left

    def _leave(self, left: dict[int, Ints], rows: Longs, kept: Longs) -> None:
        if not left:
            return
        if self.prefix_caching:
            for sequence in left:
                self._register(sequence)
            left = self._left(rows, kept)  # of twins, one has gone
        self._kept[:, rows] = kept
        for blocks in left.values():
            self._give(blocks)

    def _sequences_holding(self, block: int) -> int:
        return int(self._sharers[block]) + 1 - (block in self._digests)

    def _own(self, line: int, column: int) -> None:
        block = int(self._tables[line, column])
        if self._sequences_holding(block) > 1:
            copy = int(self._take(1)[0])
            self._blocks[copy] = self._blocks[block]
            self._tokens[copy] = self._tokens[block]
            self._tables[line, column] = copy
            self._give(np.array([block], np.int32))
        elif block in self._digests:
            self._forget(block)

    # --- beginnings ---

    def _beginning(self, tokens: Sequence[int] | Ints) -> tuple[list[bytes], Ints, Longs]:
        """Of the longest beginning of a prompt that all groups have, those of the living that are full by now among
        them: the digests, the tables (groups, blocks), and what windows have given back of it.
        """
        prompt = check_tokens(tokens, len(tokens)).astype(np.int32)
        for sequence in np.flatnonzero(self._lengths >= self.block_tokens).tolist():
            self._register(sequence)
        return self._known(prompt)

    def _register(self, sequence: int) -> None:
        """Have the index know the full blocks of a sequence. For a block whose twin another sequence holds, the twin is
        taken. There is room for no less afterwards.
        """
        tables, firsts = self._tables_of(sequence), self._first_blocks(self._kept[:, sequence]).tolist()
        chain = self._chains.setdefault(sequence, [])
        for column in range(len(chain), int(self._lengths[sequence]) // self.block_tokens):
            tokens = self._tokens[tables[0, column]]
            before = chain[-1] if chain else b""
            known = before is not None and tokens.min() != UNKNOWN
            chain.append(_chained(before, tokens) if before is not None and known else None)
            for group, first in enumerate(firsts if known else ()):
                if column >= first:
                    self._enter(tables[group], column, (chain[-1], group))

    def _enter(self, table: Ints, column: int, key: Key) -> None:
        block = int(table[column])
        twin = self._index.get(key)
        if twin is not None and twin in self._idle:
            self._forget(twin)  # for this one: to take it would cost room, where others hold this one too
            twin = None
        if twin is None:
            self._index[key], self._digests[block] = block, key
            self._is_known[block] = True
            self._sharers[block] += 1
            self._num_shared += 1
        elif twin != block:  # or another sequence that holds it has had it entered
            self._share(np.array([twin], np.int32))
            table[column] = twin
            self._give(np.array([block], np.int32))

    def _known(self, tokens: Ints) -> tuple[list[bytes], Ints, Longs]:
        """What there is of a prompt's beginning. Its last token is left to be computed."""
        found: list[tuple[bytes, list[int | None]]] = []
        digest, most = b"", 0
        runs = [0] * self._num_groups  # how many blocks each group has in a row, up to the last
        for end in range(self.block_tokens, len(tokens), self.block_tokens):
            digest = _chained(digest, tokens[end - self.block_tokens : end])
            blocks = [self._index.get((digest, group)) for group in range(self._num_groups)]
            if None in blocks[: self.groups.num_full]:
                break
            found.append((digest, blocks))
            runs = [0 if block is None else run + 1 for block, run in zip(blocks, runs, strict=True)]
            firsts = self._first_blocks(self._outside(end)).tolist()
            if all(run >= len(found) - first for run, first in zip(runs, firsts, strict=True)):
                most = len(found)
        known = [[block or 0 for block in blocks] for _, blocks in found[:most]]
        tables = np.array(known, np.int32).reshape(most, self._num_groups).T
        return [digest for digest, _ in found[:most]], tables, self._outside(most * self.block_tokens)

    def _outside(self, length: int) -> Longs:
        """The blocks that windows do not need of so many tokens."""
        return np.maximum(length - self._windows, 0) // self.block_tokens


def _chained(digest: bytes, tokens: Ints) -> bytes:
    """The digest of a block that follows on the one of `digest`. 128 bits: two contents do not meet in practice."""
    return blake2b(digest + tokens.tobytes(), digest_size=16).digest()
