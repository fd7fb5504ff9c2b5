"""Blocks that sequences share, whether they were forked or begin with the same tokens: what PAGED and SLAB_POOL are.

A block is written by whoever alone holds it; of one that others hold too, a sequence that goes on in it first gets a
copy of its own. The index knows full blocks by what stands in them: the digest of a block is that of its token ids and
of the digest before it, so equal digests are equal beginnings. The index holds a block as a sequence does. A block
that nobody else holds is idle; it stays for whoever begins with the same tokens, until its room is needed. The one
that has been idle for longest goes first, and no block before those that follow on it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from pace.ops import OperatorConfig

from .base import CacheShape, CacheStats, Count, Ints, Longs, Placement, check_tokens
from .blocks import BlockCache, blocks_within

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
        num_blocks = blocks_within(shape, capacity_bytes, block_tokens)
        super().__init__(shape, operators, block_tokens, num_blocks, num_blocks * block_tokens, huge_pages=True)
        self.prefix_caching = prefix_caching
        self._sharers = np.zeros(num_blocks, np.int32)  # who hold a block, sequences and the index, beyond the first
        self._num_shared = 0  # the sum of _sharers: without any, blocks come and go as if each were somebody's own
        self._tokens = np.zeros((num_blocks, block_tokens), np.int32)
        self._index: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # of the blocks that the index holds
        self._idle: OrderedDict[int, None] = OrderedDict()  # those that it alone holds, the longest idle first
        self._prefix_hits = self._prefix_tokens = 0

    def allocate(self, tokens: Sequence[int] | Ints | None = None) -> int:
        if tokens is None or not self.prefix_caching:
            return super().allocate()
        blocks = self._beginning(tokens)
        self._share(blocks)
        length = len(blocks) * self.block_tokens
        self._prefix_hits += length > 0
        self._prefix_tokens += length
        return self._begin(blocks, length)

    def append(self, sequences: Sequence[int], counts: Sequence[int], tokens: Ints | None = None) -> Placement:
        placement = super().append(sequences, counts, tokens)
        if self.prefix_caching:
            self._tokens.reshape(-1)[placement.slots] = UNKNOWN if tokens is None else tokens
        return placement

    def fork(self, sequence: int) -> int:
        blocks = self._blocks_held(sequence)
        self._share(blocks)
        return self._begin(blocks, self.length(sequence))

    def free(self, sequence: int) -> None:
        self.length(sequence)
        if self.prefix_caching:
            self._register(sequence)
        super().free(sequence)

    def tokens_needed(
        self, num_tokens: Count, prompt: Sequence[int] | Ints | None = None, forked_at: int | None = None
    ) -> Count:
        needed = super().tokens_needed(num_tokens)
        if forked_at is not None:
            return needed - forked_at // self.block_tokens * self.block_tokens
        if prompt is None or not self.prefix_caching:
            return needed
        held = sum(block not in self._idle for block in self._beginning(prompt).tolist())
        return needed - held * self.block_tokens

    def stats(self) -> CacheStats:
        return replace(
            super().stats(),
            cached_bytes=len(self._idle) * self.block_bytes,
            prefix_hits=self._prefix_hits,
            prefix_tokens=self._prefix_tokens,
        )

    # --- blocks and their holders ---

    def free_tokens(self) -> int:
        return (self._num_free + len(self._idle)) * self.block_tokens

    def _take(self, count: int) -> Ints:
        while self._num_free < count:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
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
        """The index gives up a block."""
        del self._index[self._digests.pop(block)]
        self._give(np.array([block], np.int32))

    # --- copy on write ---

    def _make_room(self, rows: Longs, grown: Longs, blocks: int) -> None:
        """Of each block that is gone on in, the sequence is the only holder afterwards."""
        if not self._num_shared:
            super()._make_room(rows, grown, blocks)
            return
        lengths = self._lengths[rows]
        columns = (lengths - 1) // self.block_tokens
        tails = self._tables[rows, columns]
        shared = (self._sharers[tails] > 0) & (lengths % self.block_tokens > 0) & (grown > lengths)
        writers = Counter(tails[shared].tolist())
        # Where all who hold a block write to it, the last of them keeps it.
        copies = sum(count - (count == self._sequences_holding(block)) for block, count in writers.items())
        self._require((blocks + copies) * self.block_tokens)
        for i in np.flatnonzero(shared).tolist():
            self._own(int(rows[i]), int(columns[i]))

    def _sequences_holding(self, block: int) -> int:
        return int(self._sharers[block]) + 1 - (block in self._digests)

    def _own(self, row: int, column: int) -> None:
        block = int(self._tables[row, column])
        if self._sequences_holding(block) > 1:
            copy = int(self._take(1)[0])
            self._copy(block, copy, self.block_tokens)
            self._tokens[copy] = self._tokens[block]
            self._tables[row, column] = copy
            self._give(np.array([block], np.int32))
        elif block in self._digests:
            self._forget(block)

    # --- beginnings ---

    def _beginning(self, tokens: Sequence[int] | Ints) -> Ints:
        """The blocks that hold the beginning of a prompt, those of the living that are full by now among them."""
        prompt = check_tokens(tokens, len(tokens)).astype(np.int32)
        for sequence in np.flatnonzero(self._lengths >= self.block_tokens).tolist():
            self._register(sequence)
        return np.array(list(self._known(prompt)), np.int32)

    def _register(self, sequence: int) -> None:
        """Have the index know the full blocks of a sequence. For a block whose twin it knows, the twin is taken."""
        blocks = self._tables[sequence, : self._lengths[sequence] // self.block_tokens]
        unknown = len(blocks)
        while unknown and int(blocks[unknown - 1]) not in self._digests:
            unknown -= 1
        digest = self._digests[int(blocks[unknown - 1])] if unknown else b""
        for i, block in enumerate(blocks[unknown:].tolist(), unknown):
            tokens = self._tokens[block]
            if tokens.min() == UNKNOWN:
                return
            digest = _chained(digest, tokens)
            twin = self._index.setdefault(digest, block)
            if twin == block:
                self._digests[block] = digest
                self._sharers[block] += 1
                self._num_shared += 1
            else:
                self._share(np.array([twin], np.int32))
                blocks[i] = twin
                self._give(np.array([block], np.int32))

    def _known(self, tokens: Ints) -> Iterator[int]:
        """The blocks that hold the beginning of a prompt. Its last token is left to be computed."""
        digest = b""
        for end in range(self.block_tokens, len(tokens), self.block_tokens):
            digest = _chained(digest, tokens[end - self.block_tokens : end])
            if digest not in self._index:
                return
            yield self._index[digest]


def _chained(digest: bytes, tokens: Ints) -> bytes:
    """The digest of a block that follows on the one of `digest`. 128 bits: two contents do not meet in practice."""
    return blake2b(digest + tokens.tobytes(), digest_size=16).digest()
