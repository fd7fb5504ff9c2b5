"""What the methods with a draft model share: a cache of their own, that follows the texts."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, takewhile

import numpy as np

from pace.cache import CacheFull, KVCache
from pace.models import Model
from pace.ops import Sampling
from pace.reference.arrays import Array, Float
from pace.reference.sample import SAMPLING_DTYPE

from .base import Draft, Proposer, SpeculativeConfig, Text

NEARBY = 32  # tokens that are read with the drafts: what a step or two have brought


@dataclass
class Followed:
    """Of a text the first `known` tokens have their keys and values in the cache, and behind them `guessed` have."""

    slot: int
    known: int
    guessed: list[int] = field(default_factory=list)


class Reader(Proposer):
    """Has the draft model read what the target's texts have become."""

    NEEDS_MODEL = True

    def __init__(
        self, config: SpeculativeConfig, target: Model, draft: Draft | None = None, cache: KVCache | None = None
    ) -> None:
        assert draft is not None
        assert cache is not None
        self.model, self.cache = draft.model, cache
        self._sampling = Sampling(draft.operators)
        self._followed: dict[Text, Followed] = {}

    def forget(self, text: Text) -> None:
        followed = self._followed.pop(text, None)
        if followed is not None:
            self.cache.free(followed.slot)

    def unread(self, text: Text) -> int:
        if self._most(text) <= 0:
            return 0
        known, followed = 0, self._followed.get(text) or self._followed.get(text.origin)
        if followed is not None:
            guessed = common(followed.guessed, text.ids[followed.known : followed.known + len(followed.guessed)])
            known = min(followed.known + guessed, len(text.ids))
        behind = len(text.ids) - known
        return behind if behind > NEARBY else 0

    def read(self, texts: Sequence[Text], most: int) -> None:
        self._follow(texts)
        pieces: dict[Text, list[int]] = {}
        for text in texts:
            known = self._followed[text].known
            piece = text.ids[known : min(known + most, len(text.ids) - 1)]  # the last is for a row to draw from
            if piece:
                pieces[text] = piece
                most -= len(piece)
        with suppress(CacheFull):
            self._forward(pieces)
            for text, piece in pieces.items():
                self._followed[text].known += len(piece)

    def _most(self, text: Text) -> int:
        """How many drafts there can be, for the draft model's context."""
        return self.model.max_positions - len(text.ids)

    def _able(self, texts: Sequence[Text], counts: Sequence[int]) -> dict[Text, int]:
        """Those that can have drafts, and how many."""
        able = {text: min(count, self._most(text)) for text, count in zip(texts, counts, strict=True)}
        able = {text: count for text, count in able.items() if count > 0}
        self._follow(list(able))
        return able

    # --- following ---

    def _follow(self, texts: Sequence[Text]) -> None:
        """Begin with those that are new, and forget the guesses of the others that were wrong."""
        wrong: list[Followed] = []
        for text in texts:
            followed = self._followed.get(text)
            if followed is None:
                self._followed[text] = self._begin(text)
                continue
            followed.known += common(
                followed.guessed, text.ids[followed.known : followed.known + len(followed.guessed)]
            )
            followed.known = min(followed.known, len(text.ids) - 1)  # the last is for a row to draw from
            followed.guessed = []
            if followed.known < self.cache.length(followed.slot):  # also what was left of an interrupted step
                wrong.append(followed)
        if wrong:
            self.cache.cut([each.slot for each in wrong], [each.known for each in wrong])

    def _begin(self, text: Text) -> Followed:
        """With what the cache has of its tokens."""
        origin = self._followed.get(text.origin)
        if origin is not None:
            shared = common(text.ids[:-1], text.origin.ids[: origin.known])
            with suppress(CacheFull):
                slot = self.cache.fork(origin.slot)
                self.cache.truncate(slot, shared)
                return Followed(slot, shared)
        slot = self.cache.allocate(self._readable(text.ids))
        return Followed(slot, self.cache.length(slot))

    def _readable(self, tokens: Sequence[int]) -> Array:
        """Ids that the draft model lacks, which a target with a longer table may use, are read as its last."""
        return np.minimum(np.array(tokens, np.int32), self.model.vocabulary - 1)

    # --- the model ---

    def _forward(self, pieces: dict[Text, list[int]]) -> tuple[Array, Array]:
        """Hidden states of new tokens, and where those of each text end. CacheFull where there is no room."""
        if not pieces:
            return np.zeros((0, 0), self.model.dtype), np.zeros(0, np.int32)
        slots = [self._followed[text].slot for text in pieces]
        tokens = self._readable(list(chain.from_iterable(pieces.values())))
        placement = self.cache.append(slots, [len(piece) for piece in pieces.values()], tokens)
        try:
            return self.model.forward(tokens, placement, self.cache), placement.starts[1:]
        except BaseException:
            added = np.diff(placement.starts)
            self.cache.cut(slots, (placement.lengths - added).tolist())
            raise

    def _forward_of_some(self, pieces: dict[Text, list[int]]) -> tuple[Array, Array]:
        """As many texts as the cache has room for: the last are left out of `pieces`."""
        while True:
            try:
                return self._forward(pieces)
            except CacheFull:
                pieces.popitem()

    def _draw(self, logits: Float, texts: Sequence[Text], uniforms: Sequence[float]) -> list[int]:
        """A token a row, as the target draws, but for penalties, biases and masks; -1 where there is none.

        With the number that the target will draw with: where the two distributions are alike, so are the tokens.
        """
        params = np.frombuffer(b"".join([text.row for text in texts]), SAMPLING_DTYPE)
        drawn: list[int] = self._sampling(logits, params, np.array(uniforms), None, None, None).tokens.tolist()
        return drawn


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
