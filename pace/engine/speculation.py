"""Drafts in the engine: who gets how many, what became of them, and what they cost.

A step with drafts is a step whose decoding sequences have several rows. Tokens are drawn from the rows one after the
other, as in any step; a sequence goes on with its next row as long as what was drawn is what that row's token is.
"""

import logging
import time
from collections import abc
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pace.cache import KVCache
from pace.models import Model
from pace.speculative import Proposer, SpeculativeConfig
from pace.speculative.adaptive import Adaptive

from .sequence import Sequence

logger = logging.getLogger("pace")

Result = TypeVar("Result")

READ_AT_ONCE = 256  # tokens that are read before drafts, so that nobody waits for a long prompt of somebody else


@dataclass(frozen=True)
class SpeculationStats:
    """What drafts have come to since the engine was made."""

    drafted: int = 0  # tokens
    accepted: int = 0  # of these
    verifications: int = 0  # of one sequence in one step
    proposing_seconds: float = 0.0
    speed_up: float = 1.0  # of steps without prompts, by what they would take without drafts; 1 until that is known

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a verification brought, the one among them that the target adds."""
        return 1 + self.accepted / self.verifications if self.verifications else 1.0


class Speculation:
    def __init__(self, proposer: Proposer, config: SpeculativeConfig, model: Model, cache: KVCache) -> None:
        self.proposer, self._config, self._cache = proposer, config, cache
        self._vocabulary = model.vocabulary
        self._edge = model.stretched_beyond if model.stretched_whole else None
        self._adaptive = Adaptive(config.num_tokens)
        self._failed = False
        self._seconds = 0.0  # that the drafts of this step took
        self._drafted = self._accepted = self._verifications = 0
        self._proposing_seconds = 0.0

    @property
    def most(self) -> int:
        """Drafts of a sequence in a step."""
        return self._config.num_tokens

    def drafts(self, sequences: abc.Sequence[Sequence], most: int) -> dict[Sequence, list[int]]:
        """For those that decode: the drafts of each that has any, `most` tokens in all."""
        self._seconds = 0.0
        limits = [self._limit(sequence) for sequence in sequences]
        if self._failed or not any(limits):
            return {}
        unread = self._guarded(lambda: self._read(sequences, limits))
        if unread is None:
            return {}
        limits = [0 if left else limit for left, limit in zip(unread, limits, strict=True)]
        if self._config.adaptive:
            counts = self._adaptive.choose(sequences, limits)
        else:
            counts = [min(limit, self._config.num_tokens) for limit in limits]
        if any(counts):
            counts = self._within(sequences, counts, most)
        asked = {sequence: count for sequence, count in zip(sequences, counts, strict=True) if count}
        return self._proposed(asked, len(sequences)) if asked else {}

    def observe(
        self, sequences: abc.Sequence[Sequence], drafted: list[int], accepted: list[int], seconds: float, alone: bool
    ) -> None:
        """What came of a step for those that decoded in it; alone: without prompts."""
        for sequence, tried, right in zip(sequences, drafted, accepted, strict=True):
            if tried:
                sequence.request.metrics.add_drafts(tried, right)
                self._verifications += 1
        self._drafted += sum(drafted)
        self._accepted += sum(accepted)
        self._adaptive.observe(sequences, drafted, accepted, self._seconds, seconds if alone else None)
        for sequence in sequences:
            if sequence.slot is None:
                self._adaptive.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """It has ended, or gave back what it held."""
        self._adaptive.forget(sequence)
        self._guarded(lambda: self.proposer.forget(sequence))

    def stats(self) -> SpeculationStats:
        adaptive = self._adaptive
        return SpeculationStats(
            self._drafted,
            self._accepted,
            self._verifications,
            self._proposing_seconds,
            adaptive.plain_seconds / adaptive.seconds if adaptive.seconds else 1.0,
        )

    # --- the work ---

    def _limit(self, sequence: Sequence) -> int:
        """The most drafts that a sequence can use until its end: the last token needs none."""
        most = sequence.max_tokens - len(sequence.token_ids) - 1
        if self._edge is not None and len(sequence.ids) <= self._edge:
            most = min(most, self._edge - len(sequence.ids))  # beyond it, all positions are others
        return max(most, 0)

    def _unread(self, sequences: abc.Sequence[Sequence], limits: list[int]) -> list[int]:
        """Tokens of each that can have drafts but has to be read before."""
        return [
            self.proposer.unread(sequence) if limit else 0 for sequence, limit in zip(sequences, limits, strict=True)
        ]

    def _read(self, sequences: abc.Sequence[Sequence], limits: list[int]) -> list[int]:
        """Of those for which it pays, as much as a step has time for. Returns what is unread then."""
        unread = self._unread(sequences, limits)
        if self._config.adaptive:
            chosen = self._adaptive.worth_reading(sequences, limits, unread)
        else:
            chosen = [i for i, count in enumerate(unread) if count]
        if not chosen:
            return unread
        began = time.perf_counter()
        texts = [sequences[i] for i in chosen]
        self.proposer.read(texts, READ_AT_ONCE)
        seconds = time.perf_counter() - began
        left = self._unread(sequences, limits)
        self._adaptive.observe_reading(texts, [unread[i] for i in chosen], [left[i] for i in chosen], seconds)
        self._proposing_seconds += seconds
        return left

    def _within(self, sequences: abc.Sequence[Sequence], counts: list[int], most: int) -> list[int]:
        """Cut to `most` tokens, and to what the cache has room for: nobody gives way to drafts."""
        wanted = np.array(counts, np.int64)
        wanted = np.minimum(wanted, np.maximum(most - (wanted.cumsum() - wanted), 0))
        lengths = np.array([sequence.computed for sequence in sequences], np.int64) + 1
        needed = self._cache.tokens_needed(lengths + wanted) - self._cache.tokens_needed(lengths - 1)
        fits = needed.cumsum() <= self._cache.free_tokens()
        cut: list[int] = (wanted * fits).tolist()
        return cut

    def _proposed(self, asked: dict[Sequence, int], decoding: int) -> dict[Sequence, list[int]]:
        began = time.perf_counter()
        proposed = self._guarded(lambda: self.proposer.propose(list(asked), list(asked.values()))) or []
        self._seconds = time.perf_counter() - began
        self._proposing_seconds += self._seconds
        self._adaptive.observe_proposing(list(asked), decoding, max(asked.values()), self._seconds)
        drafts = {
            sequence: self._usable(tokens, asked[sequence]) for sequence, tokens in zip(asked, proposed, strict=False)
        }
        return {sequence: tokens for sequence, tokens in drafts.items() if tokens}

    def _usable(self, tokens: abc.Sequence[int], count: int) -> list[int]:
        """As many as were asked for, up to the first that the model does not have."""
        tokens = tokens[:count]
        wrong = next((i for i, token in enumerate(tokens) if not 0 <= token < self._vocabulary), len(tokens))
        return list(tokens[:wrong])

    def _guarded(self, work: abc.Callable[[], Result]) -> Result | None:
        """Texts do not need drafts: a proposer that fails is not asked again, and everything else goes on."""
        if self._failed:
            return None
        try:
            return work()
        except Exception:
            logger.exception("speculation ends: the method %s failed", self._config.method)
            self._failed = True
            return None
