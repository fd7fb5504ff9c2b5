"""Which keys each query sees, and masks that say so."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from .arrays import Array

Mask = NDArray[np.bool_]


def visible_keys(first: int, count: int, window: int | None, spans: Array | None) -> tuple[Array, Array]:
    """The keys [begin, end) that each of `count` queries at positions from `first` on sees; two (count,) int64.

    Those up to its own; with a window, the last `window` of them; and the whole of its span, spans (count, 2), where
    it has one.
    """
    end = np.arange(first + 1, first + count + 1, dtype=np.int64)
    begin = np.zeros_like(end) if window is None else np.maximum(end - window, 0)
    if spans is not None:
        inside = spans[:, 0] < spans[:, 1]
        begin = np.where(inside, np.minimum(begin, spans[:, 0]), begin)
        end = np.where(inside, np.maximum(end, spans[:, 1]), end)
    return begin, end


@dataclass
class _Kept:
    memory: Mask  # flat, at least as large as the mask
    shape: tuple[int, int]
    readers: int = 0

    @property
    def mask(self) -> Mask:
        return self.memory[: self.shape[0] * self.shape[1]].reshape(self.shape)

    @property
    def read_only(self) -> Mask:
        mask = self.mask
        mask.flags.writeable = False
        return mask


class MaskCache:
    """Masks, (queries, keys) of bool, by what they say: every layer of a step asks for the same ones.

    The least recently used give up their memory, to the next mask that it is large enough for, so that all together
    take at most `max_bytes`. A mask larger than that is made for its reader alone. For use from several threads.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used_bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple[object, ...], _Kept] = OrderedDict()
        self._lock = Lock()

    @contextmanager
    def mask(self, first: int, count: int, length: int, window: int | None, spans: Array | None) -> Iterator[Mask]:
        """True where one of `count` queries, at positions from `first` on, sees one of `length` keys.

        Only for reading, and only within the context: the memory is another mask's later.
        """
        key = (first, count, length, window, None if spans is None else spans.tobytes())
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                self.misses += 1
                kept = self._make(first, count, length, window, spans)
                if kept.memory.nbytes <= self.max_bytes - self.used_bytes:
                    self._kept[key] = kept
                    self.used_bytes += kept.memory.nbytes
            else:
                self.hits += 1
                self._kept.move_to_end(key)
            kept.readers += 1
        try:
            yield kept.read_only
        finally:
            with self._lock:
                kept.readers -= 1

    def _make(self, first: int, count: int, length: int, window: int | None, spans: Array | None) -> _Kept:
        kept = _Kept(self._memory(count * length), (count, length))
        begin, end = visible_keys(first, count, window, spans)
        keys = np.arange(length)
        np.logical_and(begin[:, None] <= keys, keys < end[:, None], out=kept.mask)
        return kept

    def _memory(self, size: int) -> Mask:
        """New, or that of a mask that has to give way: the oldest first, and none that is being read."""
        memory = np.empty(0, np.bool_)
        for key, kept in list(self._kept.items()):
            if size > self.max_bytes or self.used_bytes + size <= self.max_bytes:
                break
            if kept.readers == 0:
                del self._kept[key]
                self.used_bytes -= kept.memory.nbytes
                memory = kept.memory if kept.memory.size >= size else memory
        return memory if memory.size >= size else np.empty(size, np.bool_)
