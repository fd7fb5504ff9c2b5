"""PARD (An et al., 2025): a draft model that was trained to guess several tokens in one forward pass.

text    t₁ t₂ t₃ t₄  m  m  m        m: the token `pard_token` of its config.json
drafts           d₁ d₂ d₃ d₄        of as many rows as there are to be drafts
"""

from collections.abc import Sequence

import numpy as np

from pace.cache import KVCache
from pace.errors import ModelError
from pace.models import Model

from .base import Draft, SpeculativeConfig, Text
from .reader import Reader


class PARD(Reader):
    def __init__(
        self, config: SpeculativeConfig, target: Model, draft: Draft | None = None, cache: KVCache | None = None
    ) -> None:
        """ModelError for a draft model that does not say which token it was trained with."""
        super().__init__(config, target, draft, cache)
        assert draft is not None
        mask = draft.config.get("pard_token")
        if not isinstance(mask, int) or isinstance(mask, bool) or not 0 <= mask < self.model.vocabulary:
            raise ModelError(
                f"pard_token in the config.json of {config.model} is {mask!r}; it must be a token below "
                f"{self.model.vocabulary}: use a PARD draft, or the method draft_model"
            )
        self._mask = mask

    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        most = self._able(texts, counts)
        pieces = {
            text: text.ids[self._followed[text].known :] + [self._mask] * (count - 1) for text, count in most.items()
        }
        hidden, ends = self._forward_of_some(pieces)
        if not pieces:
            return [[] for _ in texts]
        followed = [self._followed[text] for text in pieces]
        self.cache.cut([each.slot for each in followed], [len(text.ids) for text in pieces])
        for text, each in zip(pieces, followed, strict=True):
            each.known = len(text.ids)
        rows = np.concatenate([np.arange(end - most[text], end) for text, end in zip(pieces, ends, strict=True)])
        tokens = iter(
            self._draw(
                self.model.logits(hidden[rows]),
                [text for text in pieces for _ in range(most[text])],
                [uniform for text in pieces for uniform in text.uniforms(most[text])],
            )
        )
        drafts = {text: [next(tokens) for _ in range(most[text])] for text in pieces}
        return [drafts.get(text, []) for text in texts]
