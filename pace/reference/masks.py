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
    mask: Mask
    memory: Mask  # flat, as large as the mask or larger
    readers: int = 0


class MaskCache:
    """Masks, (queries, keys) of bool, by what they say: every layer of a step asks for the same ones.

    All together take at most `max_bytes`: the least recently used give way, and leave their memory to the new one where
    that fills at least half of it. One that finds no room beside those being read is made for its reader alone. For use
    from several threads.
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
                if self._has_room(kept.memory.nbytes):
                    self._kept[key] = kept
                    self.used_bytes += kept.memory.nbytes
            else:
                self.hits += 1
                self._kept.move_to_end(key)
            kept.readers += 1
        try:
            yield kept.mask
        finally:
            with self._lock:
                kept.readers -= 1

    def _make(self, first: int, count: int, length: int, window: int | None, spans: Array | None) -> _Kept:
        memory = self._memory(count * length)
        mask = memory[: count * length].reshape(count, length)
        begin, end = visible_keys(first, count, window, spans)
        keys = np.arange(length)
        np.less_equal(begin[:, None], keys, out=mask)
        mask &= keys < end[:, None]
        mask.flags.writeable = False
        return _Kept(mask, memory)

    def _memory(self, num_bytes: int) -> Mask:
        """For a mask of that size: one's that had to give way, or new."""
        idle = [key for key, kept in self._kept.items() if kept.readers == 0]  # the least recently used first
        for key in idle if num_bytes <= self.max_bytes else []:
            if self._has_room(num_bytes):
                break
            memory = self._kept.pop(key).memory
            self.used_bytes -= memory.nbytes
            if num_bytes <= memory.nbytes <= 2 * num_bytes:
                return memory
        return np.empty(num_bytes, np.bool_)

    def _has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.max_bytes
