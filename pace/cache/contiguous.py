"""What BMC and DYNAMIC share: the keys of a head lie in one run, from the first token of a sequence to the last.

A sequence is one block, as long as the longest sequence can be, in address space that costs nothing until it is
written. So it grows in place and nothing is ever moved; what grows is what it may use, and that counts against the
budget. It grows by whole pages of every run, so that what is counted is what the system gives.

    region 0  layer 0  K  head 0   ████████░░░░··········    █ written   ░ may be written   · address space
                          head 1   ████████░░░░··········
                       V  head 0   ████████░░░░··········
                       ⋮
    region 1  …
"""

import math
from abc import abstractmethod

import numpy as np

from pace.ops import OperatorConfig
from pace.reference.store_kv import GROUP

from .base import CacheShape, Count, Ints, Longs
from .blocks import BlockCache, blocks_within
from .memory import PAGE

ADDRESS_SPACE = 16 << 40  # at most, of the 128 TiB that a process has


def page_tokens(shape: CacheShape) -> int:
    """The fewest tokens of one head that fill whole groups and whole pages."""
    group_bytes = GROUP * shape.head_dim * shape.dtype.itemsize
    return GROUP * math.lcm(group_bytes, PAGE) // group_bytes


def rounded(num_tokens: Count, step: int) -> Count:
    """Up to a multiple of step."""
    return -(-num_tokens // step) * step


class Contiguous(BlockCache):
    """Here a block is a region: the address space of one sequence."""

    def __init__(
        self,
        shape: CacheShape,
        capacity_bytes: int,
        operators: OperatorConfig,
        step: int,
        prefix_caching: bool | None,
    ) -> None:
        if prefix_caching:
            raise ValueError("prefix_caching needs blocks that sequences can share: use PAGED or SLAB_POOL")
        self.step = rounded(step, page_tokens(shape))
        capacity = blocks_within(shape, capacity_bytes, self.step) * self.step
        region = min(rounded(shape.max_tokens, self.step), capacity)
        # What a sequence takes at least, so that there are as many regions as the budget can ever need.
        most_regions = max(1, ADDRESS_SPACE // (region * shape.bytes_per_token))
        self.least = rounded(max(1, -(-capacity // most_regions)), self.step)
        super().__init__(shape, operators, region, capacity // self.least, capacity, huge_pages=False)
        self._rooms = np.zeros(0, np.int64)  # of each sequence: tokens that it may write

    @abstractmethod
    def _grown(self, steps: Longs) -> Longs:
        """How many steps a sequence has that needs so many, from 1 up."""

    def room_for(self, lengths: Count) -> Count:
        steps = -(-np.asarray(lengths, np.int64) // self.step)
        room = np.minimum(self._grown(steps) * self.step, self.block_tokens)
        room = np.maximum(np.maximum(room, self.least), steps * self.step)
        held = np.where(steps > 0, room, 0)
        return held if isinstance(lengths, np.ndarray) else int(held)

    def free_tokens(self) -> int:
        return self.capacity_tokens - int(self._rooms.sum())

    def _make_room(self, rows: Longs, grown: Longs, blocks: int) -> None:
        if (grown <= self._rooms[rows]).all():
            return
        rooms = self.room_for(grown)
        self._require(int(rooms.sum() - self._rooms[rows].sum()))
        self._rooms[rows] = rooms

    def truncate(self, sequence: int, length: int) -> None:
        region = self._blocks_held(sequence)
        super().truncate(sequence, length)
        before, after = int(self._rooms[sequence]), self.room_for(length)
        if after < before:
            self._rooms[sequence] = after
            self._release(region, after, before)

    def _begin(self, blocks: Ints, length: int) -> int:
        sequence = super()._begin(blocks, length)
        self._rooms[sequence] = self.room_for(length)
        return sequence

    def _more_rows(self) -> None:
        super()._more_rows()
        self._rooms = np.append(self._rooms, np.zeros(len(self._lengths) - len(self._rooms), np.int64))

    def _release(self, region: Ints, begin: int, end: int) -> None:
        """The pages of tokens begin … end, of every run of a region."""
        first = int(region[0]) * self.block_bytes
        if begin == 0:
            self._memory.release(first, first + self.block_bytes)
            return
        per_token = self.shape.head_dim * self.shape.dtype.itemsize
        for run in range(first, first + self.block_bytes, self.block_tokens * per_token):
            self._memory.release(run + begin * per_token, run + end * per_token)
