"""What the cache knows tokens by: their ids, or keys that are no token's where keys and values follow from more."""

from dataclasses import dataclass
from hashlib import blake2b

OWN = 1 << 30  # the first key that is no token's: no vocabulary is so large


def key_of(*facts: int | bytes) -> int:
    """OWN and 30 bits of a digest; the 16 tokens and more of a block of the cache have 480 bits and more together."""
    return OWN + int.from_bytes(blake2b(repr(facts).encode(), digest_size=4).digest()) % OWN


@dataclass(frozen=True)
class Stretch:
    """Texts of more than `beyond` tokens have other rotary positions: by their length, or with `whole` the same ones
    from the first token on.
    """

    beyond: int
    whole: bool

    def key(self, key: int, length: int) -> int:
        """Of a token whose text has so many tokens, and which is `key` in one that is not stretched."""
        return key if length <= self.beyond else key_of(0 if self.whole else length, key)
