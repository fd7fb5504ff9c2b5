"""A file of weights in memory: read-only arrays over an mmap, whose pages can be given back."""

import mmap
from pathlib import Path

import numpy as np

from pace.errors import ModelError
from pace.reference.arrays import Array

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class MappedFile:
    """ModelError for a file that cannot be read, is empty, or is a git-lfs pointer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(len(_LFS_POINTER))
                if not head:
                    raise ModelError(f"{path} is empty: download it again")
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from None
        if head == _LFS_POINTER:
            raise ModelError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")

    def __len__(self) -> int:
        return len(self.bytes)

    def array(self, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        """A view of the file; a copy where the file does not align it."""
        return np.require(np.ndarray(shape, dtype, self.bytes, offset), requirements="A")

    def release(self, offset: int, num_bytes: int) -> None:
        """Give the pages of these bytes back to the system. They can still be read: that fetches them again."""
        start = offset - offset % mmap.PAGESIZE
        if num_bytes:
            self.bytes.madvise(mmap.MADV_DONTNEED, start, offset + num_bytes - start)
