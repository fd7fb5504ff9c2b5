"""The one loop: next batch → forward → sample → retire. Knows token ids, and text only through a sequence's stream."""

import logging
import time
from collections import Counter, abc
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pace.cache import CacheFull, CacheStats, KVCache
from pace.cache.base import Ints
from pace.models import Model
from pace.ops import OperatorConfig
from pace.reference.arrays import Array

from .config import EngineConfig
from .encoder import ImageEncoder
from .intake import Intake
from .request import Request
from .sampler import Sampler
from .scheduler import Batch, Scheduler
from .sequence import Sequence
from .speculation import Speculation, SpeculationStats
from .tokenizer import Tokenizer

logger = logging.getLogger("pace")

DRAWN_ROWS = 256  # of logits at a time, of whole sequences: each is a whole vocabulary
LOGIT_ROWS = 64  # of a prompt at a time, whose log-probabilities are asked for: a row is a whole vocabulary


class QueueFull(RuntimeError):
    """More requests wait than may; the request was not taken."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was made, and what it is at."""

    running: int  # sequences
    waiting: int
    requests: int
    finished: dict[str, int]  # requests by how their first text ended
    steps: int
    preemptions: int
    prompt_tokens: int  # of the requests that have ended
    cached_tokens: int  # of those, what the cache had already
    output_tokens: int
    cache: CacheStats
    speculation: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def prefix_hit_rate(self) -> float:
        """The share of prompts' tokens that did not have to be computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Engine:
    """Not for several threads at once: see AsyncEngine."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        operators: OperatorConfig | None = None,
        generation_config: abc.Mapping[str, Any] | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.model, self.cache, self.tokenizer = model, cache, tokenizer
        self.config = config or EngineConfig()
        self.intake = Intake(model, cache, tokenizer, generation_config or {}, self.config.max_batch_tokens)
        self.scheduler = Scheduler(cache, self.config, speculation)
        self._sampler = Sampler(tokenizer, operators or OperatorConfig())
        self._images = ImageEncoder(model)
        self._requests = self._steps = self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._finished: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, request: Request) -> None:
        """Queue a request, made by Intake. QueueFull where too many wait, with the numbers."""
        self._check_queue(request)
        request.arrival = self._requests
        self._requests += 1
        self.scheduler.add(request.sequences[:1])

    def _check_queue(self, request: Request) -> None:
        """Whether there is room for one more of those that have not begun."""
        most, most_tokens = self.config.max_waiting, self.config.max_waiting_tokens
        if most is None and most_tokens is None:
            return
        waiting = [sequence.request for sequence in self.scheduler.waiting if not sequence.request.begun]
        if most is not None and len(waiting) >= most:
            raise QueueFull(f"{len(waiting)} requests wait, and max_waiting is {most}: try again later")
        tokens, more = sum(len(other.prompt_token_ids) for other in waiting), len(request.prompt_token_ids)
        if most_tokens is not None and waiting and tokens + more > most_tokens:
            raise QueueFull(
                f"{tokens} tokens of prompts wait, and max_waiting_tokens is {most_tokens}: no room for {more} more, "
                "try again later"
            )

    def cancel(self, request: Request) -> None:
        """End a request wherever it is; nothing where it has ended, or never was added."""
        if request.arrival is not None and not request.finished:
            self._end(request, "cancelled")

    def step(self) -> list[Request]:
        """One forward pass, and before it at most one image; returns the requests that it brought a token or an end.

        A step that raises ends the requests of its batch, with the reason, and the engine goes on. One that is
        interrupted (Ctrl-C) is as if it had not begun.
        """
        try:
            self.scheduler.admit()
            if (failed := self._encode_image()) is not None:
                return [failed]
            batch = self.scheduler.next_batch()
        except CacheFull as error:  # something else holds the cache
            (sequence,) = self.scheduler.running
            self._end(sequence.request, "error", str(error))
            return [sequence.request]
        except BaseException:
            self.scheduler.take_back()
            raise
        if batch is None:
            return []
        began, told = time.perf_counter(), [batch.sequences[i] for i in batch.ready]
        accepted: list[int] | None = None
        try:
            accepted = self._advance(batch, told)
        except Exception as error:
            logger.exception("a step failed: the %d sequences of its batch end with it", len(batch.sequences))
            self._fail(batch, f"{type(error).__name__}: {error}")
            told = batch.sequences
        except BaseException:
            self.scheduler.take_back()
            raise
        finally:
            self.scheduler.retire(batch)
        if accepted is not None:
            self.scheduler.observe(batch, accepted, time.perf_counter() - began)
        return self._news(told)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            requests=self._requests,
            finished=dict(self._finished),
            steps=self._steps,
            preemptions=self.scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            cache=self.cache.stats(),
            speculation=SpeculationStats()
            if self.scheduler.speculation is None
            else self.scheduler.speculation.stats(),
        )

    # --- a step ---

    def _encode_image(self) -> Request | None:
        """The first image that is the next of someone who runs, unless it is known. Where that fails, the request has
        ended, and is returned.
        """
        encoded = False
        for sequence in self.scheduler.running:
            image = sequence.next_image if sequence.images else None
            if image is None or sequence.encoded is not None:
                continue
            rows = self._images.known(image.pixels)
            if rows is None and not encoded:
                try:
                    rows, encoded = self._images.encode(image.pixels), True
                except Exception as error:
                    logger.exception("an image of request %s can't be encoded", sequence.request.id)
                    self._end(sequence.request, "error", f"{type(error).__name__}: {error}")
                    return sequence.request
            sequence.encoded = None if rows is None else (image, rows)
        return None

    def _advance(self, batch: Batch, told: list[Sequence]) -> list[int]:
        """told: who draws a token, or is embedded; whose prompt turns out to be at fault is added. Returns how many
        drafts were right, of each that decodes.
        """
        seen = {} if batch.placement.spans is None else {"seen": _seen(batch)}
        hidden, drawing = self.model.forward(batch.tokens, batch.placement, self.cache, **seen), batch.drawing
        told += self._read_prompts(batch, hidden)
        self._steps += 1
        accepted = [0] * batch.num_decoding
        for indices in batch.in_parts(drawing, DRAWN_ROWS):
            self._draw(batch, hidden, indices, accepted)
        self._pool(batch, hidden)
        for i, (sequence, count) in enumerate(zip(batch.sequences, batch.counts, strict=True)):
            sequence.computed += 1 + accepted[i] if i < batch.num_decoding else count
            if sequence.encoded is not None and sequence.encoded[0].begin < sequence.computed:
                sequence.encoded = None
        self._drop_drafts(batch, accepted)
        return accepted

    def _draw(self, batch: Batch, hidden: Array, indices: list[int], accepted: list[int]) -> None:
        """The next token of each sequence; and as long as that is its next draft, one more. `accepted` counts them.

        Row by row as without drafts, so that all that a token depends on is as it would be.
        """
        logits = self.model.logits(hidden[batch.drawn_rows(indices)])
        sizes = [1 + len(batch.drafts_of(i)) for i in indices]
        rows = dict(zip(indices, np.cumsum([0, *sizes]).tolist(), strict=False))
        while rows:
            drawn = logits if len(rows) == len(logits) else logits[list(rows.values())]
            self._sampler.sample(drawn, [batch.sequences[i] for i in rows])
            rows = {i: row + 1 for i, row in rows.items() if batch.goes_on(i, accepted)}
            for i in rows:
                accepted[i] += 1

    def _drop_drafts(self, batch: Batch, accepted: list[int]) -> None:
        """Those that were wrong, from the cache."""
        wrong = {
            sequence.slot: sequence.computed
            for sequence, drafts, right in zip(batch.sequences, batch.drafts, accepted, strict=False)
            if right < len(drafts) and sequence.slot is not None
        }
        if wrong:
            self.cache.cut(list(wrong), list(wrong.values()))

    def _read_prompts(self, batch: Batch, hidden: Array) -> list[Sequence]:
        """Log-probabilities of the prompts that went through the model, where they are asked for. Returns those that
        have none, which ends them.
        """
        ended = []
        for i, sequence in enumerate(batch.sequences):
            request = sequence.request
            if sequence.index or not request.missing_prompt_logprobs:
                continue
            assert request.params.prompt_logprobs is not None
            known = request.prompt_logprobs  # of the tokens before the first whose row is wanted
            first = batch.placement.starts[i] - sequence.computed
            end = min(sequence.computed + batch.counts[i] + 1, sequence.num_prompt)
            for at in range(len(known), end, LOGIT_ROWS):
                tokens = np.array(sequence.ids[at : min(at + LOGIT_ROWS, end)], np.int32)
                logits = self.model.logits(hidden[first + at - 1 : first + at - 1 + len(tokens)])
                try:
                    known += self._sampler.logprobs_of(logits, tokens, request.params.prompt_logprobs)
                except ValueError as error:
                    sequence.finish("error", str(error))
                    ended.append(sequence)
                    break
        return ended

    def _pool(self, batch: Batch, hidden: Array) -> None:
        """Add up the prompts that are to be embedded; those that are through have ended."""
        for i, sequence in enumerate(batch.sequences):
            request = sequence.request
            if request.pool is None:
                continue
            start, end = batch.placement.starts[i : i + 2]
            request.pool.add(hidden[start:end], sequence.computed)
            if batch.counts[i] < sequence.pending:
                continue
            try:
                request.embedding = request.pool.embedding()
                sequence.finish("stop")
            except ValueError as error:
                sequence.finish("error", str(error))

    def _fail(self, batch: Batch, reason: str) -> None:
        self.scheduler.take_back()  # what was not written must not be found by others
        for sequence in batch.sequences:
            if sequence.finish_reason is None:
                with suppress(Exception):  # its text may be what failed
                    sequence.finish("error", reason)

    def _end(self, request: Request, reason: str, detail: str | None = None) -> None:
        """All of its texts that have not ended."""
        try:
            for sequence in request.sequences:
                if sequence.finish_reason is None:
                    sequence.finish(reason, detail)
        finally:
            self.scheduler.withdraw(request)
            self._count_end(request)

    def _news(self, sequences: abc.Iterable[Sequence]) -> list[Request]:
        """The requests of sequences that have a new token or have ended, each once; and what there is to count."""
        requests = list(dict.fromkeys(sequence.request for sequence in sequences))
        for request in requests:
            if request.finished:
                self._count_end(request)
        return requests

    def _count_end(self, request: Request) -> None:
        self._finished[request.sequences[0].finish_reason or ""] += 1
        self._prompt_tokens += len(request.prompt_token_ids)
        self._cached_tokens += request.cached_tokens or 0
        self._output_tokens += request.num_output_tokens


def _seen(batch: Batch) -> tuple[Ints, Array]:
    """Which tokens of a batch stand for images, and what they are to the model, for Model.forward."""
    indices, rows = [], []
    for sequence, start, count in zip(batch.sequences, batch.placement.starts, batch.counts, strict=False):
        if sequence.encoded is None:
            continue
        image, encoded = sequence.encoded
        at = image.begin - sequence.computed
        if at < count:
            indices.append(np.arange(start + at, start + at + len(encoded), dtype=np.int32))
            rows.append(encoded)
    return np.concatenate(indices), np.concatenate(rows)
