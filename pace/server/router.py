"""Which engine takes a request: the one that has the least to do with it, what it has cached of its prompt included."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

import numpy as np

BLOCK = 64  # tokens by which prompts are compared
REMEMBERED = 8192  # blocks of an engine's latest prompts
TEXT = 64  # tokens of output that a request is reckoned at


@dataclass
class Bearer:
    """What the router knows of one engine. Loads are tokens: those to compute, and those that are held meanwhile."""

    index: int
    capacity: int = 1  # tokens of its cache
    load: int = 0
    blocks: "OrderedDict[bytes, None]" = field(default_factory=OrderedDict)

    def cached(self, chain: Sequence[bytes]) -> int:
        """How many tokens of a prompt went through this engine not long ago."""
        known = 0
        for block in chain:
            if block not in self.blocks:
                break
            known += BLOCK
        return known

    def take(self, tokens: int, chain: Iterable[bytes]) -> None:
        self.load += tokens + TEXT
        for block in chain:
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        for old in list(islice(self.blocks, max(len(self.blocks) - REMEMBERED, 0))):
            del self.blocks[old]

    def forget(self) -> None:
        """Its engine begins anew."""
        self.load = 0
        self.blocks.clear()

    def release(self, tokens: int) -> None:
        self.load -= tokens + TEXT


def chain_of(prompt: Sequence[int]) -> list[bytes]:
    """A name for each block of a prompt and all before it."""
    tokens, name, chain = np.asarray(prompt, np.int64), b"", []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        name = blake2b(name + tokens[start : start + BLOCK].tobytes(), digest_size=16).digest()
        chain.append(name)
    return chain


def choose(bearers: Sequence[Bearer], tokens: int, chain: Sequence[bytes]) -> Bearer:
    """Of those that are up, by the share of its cache that each would have in use; then the lowest number."""
    return min(bearers, key=lambda each: ((each.load + tokens - each.cached(chain)) / each.capacity, each.index))
