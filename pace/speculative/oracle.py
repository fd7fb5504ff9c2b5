"""A proposer that knows how texts go on, and is right with a given probability: for tests and benchmarks."""

from collections.abc import Sequence

import numpy as np

from pace.cache import KVCache
from pace.models import Model

from .base import Draft, Proposer, SpeculativeConfig, Text


class Oracle(Proposer):
    """`knows` are whole texts, prompts and all. Each draft is right with `probability`, whatever the others are."""

    def __init__(
        self,
        config: SpeculativeConfig,
        target: Model,
        draft: Draft | None = None,
        cache: KVCache | None = None,
        probability: float = 0.8,
    ) -> None:
        self.knows: list[list[int]] = []
        self.probability, self._vocabulary = probability, target.vocabulary
        self._of: dict[Text, list[int]] = {}
        self._generator = np.random.default_rng(0)

    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        return [self._drafts(text, count) for text, count in zip(texts, counts, strict=True)]

    def forget(self, text: Text) -> None:
        self._of.pop(text, None)

    def _drafts(self, text: Text, count: int) -> list[int]:
        length = len(text.ids)
        if text not in self._of:
            self._of[text] = next((whole for whole in self.knows if whole[:length] == text.ids), [])
        right = self._of[text][length : length + count]
        chances = self._generator.random(len(right)) < self.probability
        return [token if good else (token + 1) % self._vocabulary for token, good in zip(right, chances, strict=True)]
