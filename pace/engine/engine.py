"""The one loop: next batch → forward → sample → retire. Knows token ids, and text only through a request's stream."""

import numpy as np

from pace.cache import KVCache
from pace.models import Model
from pace.ops import OperatorConfig

from .request import Request
from .sampler import Sampler
from .scheduler import Batch, Scheduler
from .tokenizer import Tokenizer

MAX_BATCH_TOKENS = 1024  # of prompts in one forward pass: past a few hundred the products gain nothing
MAX_SEQUENCES = 256


class Engine:
    def __init__(
        self,
        model: Model,
        cache: KVCache,
        tokenizer: Tokenizer,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
        operators: OperatorConfig | None = None,
    ) -> None:
        self.model, self.cache = model, cache
        self.scheduler = Scheduler(cache, max_batch_tokens, max_sequences)
        self._sampler = Sampler(tokenizer, operators or OperatorConfig())

    def add(self, request: Request) -> None:
        """Queue a request; it must fit the model's context and the cache (LLM checks that)."""
        self.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """End a request wherever it is; nothing where it has ended."""
        if request.finish_reason is not None:
            return
        try:
            request.cancel()
        finally:
            self.scheduler.withdraw(request)
            self.scheduler.retire()

    def step(self) -> list[Request]:
        """One forward pass; returns the requests that it brought a token or an end."""
        batch = self.scheduler.next_batch()
        try:
            return self._advance(batch)
        except BaseException:  # Ctrl-C too: whoever is not cancelled goes on as if the step had not begun
            self._take_back(batch)
            raise
        finally:
            self.scheduler.retire()

    def _advance(self, batch: Batch) -> list[Request]:
        hidden = self._forward(batch)
        ready = [batch.requests[i] for i in batch.complete]
        if ready:
            self._sampler.sample(self.model.logits(hidden[self._last_rows(batch)]), ready)
        return ready

    def _take_back(self, batch: Batch) -> None:
        """Forget what was computed and led to no token: between steps a request's last token is never in the cache."""
        for request in batch.requests:
            assert request.sequence is not None
            request.computed = min(request.computed, len(request.prompt_token_ids) + len(request.token_ids) - 1)
            self.cache.truncate(request.sequence, request.computed)

    def _forward(self, batch: Batch) -> np.ndarray:
        counts = [len(tokens) for tokens in batch.tokens]
        sequences = [request.sequence for request in batch.requests if request.sequence is not None]
        tokens = np.fromiter((token for piece in batch.tokens for token in piece), np.int32, sum(counts))
        placement = self.cache.append(sequences, counts, tokens)
        hidden = self.model.forward(tokens, placement, self.cache)
        for request, count in zip(batch.requests, counts, strict=True):
            request.computed += count
        return hidden

    def _last_rows(self, batch: Batch) -> np.ndarray:
        """The row of each request whose next token can be drawn."""
        ends = np.cumsum([len(tokens) for tokens in batch.tokens]) - 1
        rows: np.ndarray = ends[batch.complete]
        return rows
