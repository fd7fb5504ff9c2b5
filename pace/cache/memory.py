"""Address space for keys and values: reserved at once, given pages as they are first written.

An array of zeros would be that too, but it may not be larger than the memory that there is, its pages cannot be given
back one by one, and whether they are huge is not ours to say.
"""

import mmap
import sys
from contextlib import suppress

import numpy as np

PAGE = mmap.PAGESIZE
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Memory:
    """`bytes` reads as zeros where nothing was written yet, or since it was released.

    huge_pages: fewer misses of the TLB, but what is touched takes 2 MB at a time.
    """

    def __init__(self, num_bytes: int, huge_pages: bool) -> None:
        try:
            self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        except OSError as error:
            raise MemoryError(
                f"no address space for the cache's {num_bytes} bytes: {error.strerror}; give fewer kv_cache_bytes, or, "
                "where address space is limited, use SLAB_POOL or PAGED, which take no more of it than that"
            ) from None
        self._advise("MADV_HUGEPAGE" if huge_pages else "MADV_NOHUGEPAGE")
        self.bytes = np.frombuffer(self._map, np.uint8)

    def _advise(self, advice: str) -> None:
        with suppress(OSError, AttributeError):  # a system without huge pages
            self._map.madvise(getattr(mmap, advice))

    def release(self, begin: int, end: int) -> None:
        """Give the pages of bytes begin … end back to the system. Both are multiples of PAGE."""
        self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)
