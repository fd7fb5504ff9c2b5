"""Who is in the next batch: first come first served, prompts before further tokens, within the room of the cache.

A request is admitted when the cache has room for all that it can become, so it never has to be put back.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from pace.cache import KVCache

from .request import Request


@dataclass(frozen=True)
class Batch:
    """New tokens of each request; `complete` says whose next token can be drawn after them."""

    requests: list[Request]
    tokens: list[list[int]]

    @property
    def complete(self) -> list[int]:
        """Indices into `requests`, once the batch has been through the model."""
        return [i for i, request in enumerate(self.requests) if request.prefilled]


class Scheduler:
    """`max_batch_tokens` bounds the prompts' tokens in a batch, `max_sequences` the requests that run at once."""

    def __init__(self, cache: KVCache, max_batch_tokens: int, max_sequences: int) -> None:
        self.cache, self.max_batch_tokens, self.max_sequences = cache, max_batch_tokens, max_sequences
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._reserved = 0  # tokens of capacity, of those who run

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def next_batch(self) -> Batch:
        """Admit whom there is room for; then pieces of prompts, or one token of everybody if no prompt is left."""
        self._admit()
        prefilling = [request for request in self._running if not request.prefilled]
        if prefilling:
            return self._prompts(prefilling)
        return Batch(self._running[:], [request.next_tokens(1) for request in self._running])

    def _admit(self) -> None:
        capacity = self.cache.stats().capacity_tokens
        while self._waiting and len(self._running) < self.max_sequences:
            needed = self.cache.tokens_needed(self._waiting[0].most_tokens)
            if self._reserved + needed > capacity:
                break
            request = self._waiting.popleft()
            request.sequence = self.cache.allocate(request.prompt_token_ids)
            request.computed = self.cache.length(request.sequence)  # what the cache had of the prompt
            self._reserved += needed
            self._running.append(request)

    def _prompts(self, prefilling: Sequence[Request]) -> Batch:
        """As much of the prompts as one batch takes, the first come first."""
        requests, tokens, left = [], [], self.max_batch_tokens
        for request in prefilling:
            piece = request.next_tokens(left)
            requests.append(request)
            tokens.append(piece)
            left -= len(piece)
            if left == 0:
                break
        return Batch(requests, tokens)

    def retire(self) -> None:
        """Give back what finished requests held."""
        for request in [request for request in self._running if request.finish_reason is not None]:
            self._running.remove(request)
            assert request.sequence is not None
            self.cache.free(request.sequence)
            self._reserved -= self.cache.tokens_needed(request.most_tokens)

    def withdraw(self, request: Request) -> None:
        """Take out one that waits; nothing where it does not."""
        if request.sequence is None:
            with suppress(ValueError):
                self._waiting.remove(request)
