"""What BMC and DYNAMIC share: the keys of a head lie in one run, from the first token of a sequence to the last.

A sequence is one block, as long as the longest sequence can be, in address space that costs nothing until it is
written. So it grows in place and nothing is ever moved; what grows is what it may use, and that counts against the
budget. It grows by whole pages of every run, so that what is counted is what the system gives.

    region 0  layer 0  K  head 0   ████████░░░░··········    █ written   ░ may be written   · address space
                          head 1   ████████░░░░··········
                       V  head 0   ████████░░░░··········
                       ⋮
    region 1  …

A layer with a window gives back the pages before it and grows by single steps, so that it holds little more than it
sees:

              layer 1  K  head 0   ······██░·············
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pace.ops import OperatorConfig
from pace.reference.store_kv import GROUP

from .base import CacheShape, Count, Longs
from .blocks import BlockCache
from .memory import PAGE
from .windows import Groups, kinds_of, most_blocks

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
        step_bytes = self.step * shape.bytes_per_token
        if capacity_bytes < step_bytes:
            raise ValueError(f"kv_cache_bytes is {capacity_bytes}; one block of this model takes {step_bytes}")
        capacity = capacity_bytes // step_bytes * self.step
        kinds = kinds_of(shape)
        full = len(kinds.pop(None, []))
        region = rounded(shape.max_tokens, self.step)
        if full:  # no more than these layers can have of the budget
            region = min(region, capacity * shape.num_layers // full // self.step * self.step)
        # What a sequence takes at least, so that there are as many regions as the budget can ever need.
        most_regions = max(1, ADDRESS_SPACE // (region * shape.bytes_per_token))
        self.least = rounded(max(1, -(-capacity // most_regions)), self.step)
        layer_bytes = shape.bytes_per_token // max(shape.num_layers, 1)
        # Layers come to hold different numbers of tokens only where there are windows.
        parts, part_bytes = (shape.num_layers, layer_bytes) if kinds else (1, shape.bytes_per_token)
        self._full = full if kinds else 1  # parts that grow as the sequence does
        places = tuple((0, layer) for layer in range(shape.num_layers))
        groups = Groups(shape.num_layers, (None,), places)
        regions = capacity // self.least
        super().__init__(
            shape, operators, groups, region, regions, parts, part_bytes, capacity * parts, huge_pages=False
        )
        self._rooms = np.zeros(0, np.int64)  # of each sequence: tokens that it may write
        self._windowed = list(kinds.values())  # the layers of each window
        self._windows = np.array([window for window in kinds if window], np.int64)
        self._kept, self._window_tokens = np.zeros((len(kinds), 0), np.int64), self.least
        self._layers_of = np.array([len(layers) for layers in self._windowed], np.int64)
        self._in_windows = 0  # parts that layers with windows hold

    @abstractmethod
    def _grown(self, steps: Longs) -> Longs:
        """How many steps a sequence has that needs so many, from 1 up."""

    def room_for(self, lengths: Count) -> Count:
        """Tokens that sequences of these lengths may write."""
        steps = -(-np.asarray(lengths, np.int64) // self.step)
        room = np.minimum(self._grown(steps) * self.step, self.block_tokens)
        room = np.maximum(np.maximum(room, self.least), steps * self.step)
        held = np.where(steps > 0, room, 0)
        return held if isinstance(lengths, np.ndarray) else int(held)

    def free_parts(self) -> int:
        return self.capacity - int(self._rooms.sum()) * self._full - self._in_windows

    def parts_needed(self, lengths: Count, chunk: int | None) -> Count:
        parts = self.room_for(lengths) * self._full
        for window, layers in zip(self._windows.tolist(), self._windowed, strict=True):
            parts = parts + most_blocks(lengths, chunk, window, self.least) * self.least * len(layers)
        return parts

    def tokens_to_come(self, sequences: Sequence[int], lengths: Longs, chunks: Longs) -> int:
        rows = np.array(sequences, np.int64)
        parts = np.maximum(self.room_for(lengths) - self._rooms[rows], 0) * self._full
        steps = self._steps(rows)
        for i, window in enumerate(self._windows.tolist()):
            more = np.maximum(most_blocks(lengths, chunks, window, self.least) - steps[i], 0)
            parts += more * self.least * self._layers_of[i]
        return self._in_tokens(int(parts.sum()))

    def held_tokens(self, sequences: Sequence[int]) -> int:
        rows = np.array(sequences, np.int64)
        parts = (
            int(self._rooms[rows].sum()) * self._full + int((self._steps(rows).T @ self._layers_of).sum()) * self.least
        )
        return parts // self.parts

    def _steps(self, rows: Longs) -> Longs:
        """What windows hold of each sequence, (windows, sequences), in units of `least`."""
        steps: Longs = -(-self._lengths[rows] // self.least) - self._kept[:, rows]
        return steps

    def _make_room(self, rows: Longs, grown: Longs, blocks: int, kept: Longs) -> None:
        if len(self._windows):
            self._make_room_in_windows(rows, grown, kept)
            return
        if (grown <= self._rooms[rows]).all():
            return
        rooms = self.room_for(grown)
        self._require(int(rooms.sum() - self._rooms[rows].sum()))
        self._rooms[rows] = rooms

    def _make_room_in_windows(self, rows: Longs, grown: Longs, kept: Longs) -> None:
        rooms, before = self.room_for(grown), self._kept[:, rows]
        more = -(-grown // self.least) - kept - self._steps(rows)
        in_windows = int((self._layers_of @ more).sum()) * self.least
        self._require(int((rooms - self._rooms[rows]).sum()) * self._full + in_windows)
        self._rooms[rows] = rooms
        self._in_windows += in_windows
        for i, column in zip(*(each.tolist() for each in (kept > before).nonzero()), strict=True):
            region = int(self._tables[rows[column], 0])
            self._release(region, self._windowed[i], *(int(each[i, column]) * self.least for each in (before, kept)))
        self._kept[:, rows] = kept

    def _hold_alike(self, before: Longs, after: Longs) -> NDArray[np.bool_]:
        steps = -(-before // self.least) == -(-after // self.least)
        alike: NDArray[np.bool_] = steps & (self.room_for(before) == self.room_for(after))
        return alike

    def fork(self, sequence: int) -> int:
        length, region = self.length(sequence), int(self._tables[sequence, 0])
        steps = self._steps(np.array([sequence]))[:, 0]
        in_windows = int(self._layers_of @ steps) * self.least
        room = self.room_for(length)
        self._require(room * self._full + in_windows)
        fork = self.allocate()
        if length:
            copy = int(self._take(1)[0])
            self._tables[fork, 0] = copy
            for layers, begin in self._begins(sequence):
                groups = slice(begin // GROUP, -(-length // GROUP))
                for layer in layers:
                    self._blocks[copy, layer, ..., groups, :] = self._blocks[region, layer, ..., groups, :]
        self._lengths[fork], self._rooms[fork], self._kept[:, fork] = length, room, self._kept[:, sequence]
        self._in_windows += in_windows
        return fork

    def _begins(self, sequence: int) -> list[tuple[list[int], int]]:
        """All layers, those that hold a sequence from the same token on together, with that token."""
        full = [layer for layer, window in enumerate(self._seen) if window is None]
        kept = (self._kept[:, sequence] * self.least).tolist()
        return [(full, 0), *zip(self._windowed, kept, strict=True)]

    def _drop(self, sequence: int, before: int, length: int) -> None:
        if before == length:
            return
        region, room, left = int(self._tables[sequence, 0]), int(self._rooms[sequence]), self.room_for(length)
        ends = [rounded(each, self.least) for each in (before, length)]
        begins = self._begins(sequence) if len(self._windows) else [(list(range(self.shape.num_layers)), 0)]
        self._rooms[sequence] = left
        for layers, begin in begins[1:]:
            self._in_windows -= (ends[0] - max(ends[1], begin)) * len(layers)
        if length == 0:
            self._give(self._tables[sequence, :1])
            self._memory.release(region * self.block_bytes, (region + 1) * self.block_bytes)
            return
        self._release(region, begins[0][0], left, room)
        for layers, _ in begins[1:]:
            self._release(region, layers, ends[1], ends[0])

    def _more_rows(self) -> None:
        super()._more_rows()
        self._rooms = np.append(self._rooms, np.zeros(len(self._lengths) - len(self._rooms), np.int64))

    def _release(self, region: int, layers: list[int], begin: int, end: int) -> None:
        """The pages of tokens begin … end, of every run of these layers."""
        end = min(end, self.block_tokens)
        if end <= begin:
            return
        per_token = self.shape.head_dim * self.shape.dtype.itemsize
        run_bytes, runs = self.block_tokens * per_token, 2 * self.shape.kv_heads
        for layer in layers:
            first = region * self.block_bytes + layer * runs * run_bytes
            for run in range(first, first + runs * run_bytes, run_bytes):
                self._memory.release(run + begin * per_token, run + end * per_token)
