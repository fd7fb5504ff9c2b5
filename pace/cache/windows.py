"""Layers by how far they see: groups that hold blocks together, and what a window has to hold."""

from dataclasses import dataclass

import numpy as np

from .base import CacheShape, Count, Longs

MOST_PADDING = 1 / 12  # of the layers. Fewer groups have fewer tables to keep; what is padded is lost to the cache


@dataclass(frozen=True)
class Groups:
    """A block holds so many `layers` of one group: its tables say where. Those without a window stand first."""

    layers: int
    windows: tuple[int | None, ...]  # of each group
    places: tuple[tuple[int, int], ...]  # of each layer: its group, and which of the group's layers it is

    @property
    def num_full(self) -> int:
        return self.windows.count(None)


def kinds_of(shape: CacheShape) -> dict[int | None, list[int]]:
    """The layers of each window, those that see all first."""
    windows = shape.windows or (None,) * shape.num_layers
    order = sorted(set(windows), key=lambda window: -1 if window is None else window)
    return {kind: [layer for layer, window in enumerate(windows) if window == kind] for kind in order}


def deal(shape: CacheShape) -> Groups:
    """Layers into groups of equally many, one window a group; the last group of a window may have fewer.

    So blocks are alike, and whichever group needs one takes it. As many layers to a group as pad little.
    """
    kinds = kinds_of(shape)
    size = max(n for n in range(1, shape.num_layers + 1) if _padding(kinds, n) <= MOST_PADDING * shape.num_layers)
    size = min(size, max(map(len, kinds.values())))
    windows: list[int | None] = []
    places = [(0, 0)] * shape.num_layers
    for window, layers in kinds.items():
        for i, layer in enumerate(layers):
            places[layer] = len(windows) + i // size, i % size
        windows += [window] * -(-len(layers) // size)
    return Groups(size, tuple(windows), tuple(places))


def _padding(kinds: dict[int | None, list[int]], size: int) -> int:
    return sum(-len(layers) % size for layers in kinds.values())


def most_blocks(length: Count, chunk: Longs | int | None, window: int, block_tokens: int) -> Count:
    """Blocks that a window holds at most of a sequence on its way to `length`, if no append brings more than `chunk`
    tokens (None: any number).

    Right after an append it holds the `window` tokens before, the new ones, and what else their blocks hold. window +
    chunk tokens in a row lie in at most ⌈(window + chunk - 1) / block_tokens⌉ + 1 blocks.
    """
    whole = -(-length // block_tokens)
    return whole if chunk is None else lesser(whole, -(-(window + chunk - 1) // block_tokens) + 1)


def lesser(a: Count, b: Longs | int) -> Count:
    """Of numbers or of arrays."""
    return np.minimum(a, b) if isinstance(a, np.ndarray) else min(a, b)  # type: ignore[return-value]
