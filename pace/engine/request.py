"""A request on its way through the engine, and what its user gets to see of it."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .sampling_params import SamplingParams
from .stopping import TextStream


class Logprob(NamedTuple):
    """Of one token at one place: its log-probability, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class Metrics:
    """Seconds of time.perf_counter."""

    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    finished: float | None = None


@dataclass
class CompletionOutput:
    """What the model wrote, so far. Log-probabilities are natural logarithms; None where they were not asked for."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None  # "stop", "length", "cancelled", "error"
    stop_reason: int | str | None  # the token or the string that stopped it, or what went wrong
    new_text: str = ""  # since the output before this one, when streaming


@dataclass
class RequestOutput:
    """A request as its user sees it; `outputs` has one element, `prompt` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Metrics


@dataclass(eq=False)
class Request:
    """`computed` of its tokens (the prompt's, then the output's) have their keys and values in the cache."""

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    end_tokens: frozenset[int]
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    computed: int = 0
    sequence: int | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.row = self.params.row()
        self.generator = np.random.Generator(np.random.Philox(self.params.seed))
        self.counts: dict[int, int] = dict.fromkeys(self.prompt_token_ids, 0) if self.params.penalises else {}
        self._shown = 0

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt has been through the model."""
        return self.computed >= len(self.prompt_token_ids)

    @property
    def most_tokens(self) -> int:
        """All tokens that it can come to hold in the cache."""
        return len(self.prompt_token_ids) + self.max_tokens

    def next_tokens(self, limit: int) -> list[int]:
        """What comes next into the model: a piece of the prompt, or the last token that was drawn."""
        if self.prefilled:
            return self.token_ids[-1:]
        return self.prompt_token_ids[self.computed : self.computed + limit]

    def accept(self, token: int) -> None:
        """One more token of output, which may be the last."""
        now = time.perf_counter()
        if self.metrics.first_token is None:
            self.metrics.first_token = now
        self.token_ids.append(token)
        if self.params.penalises:
            self.counts[token] = self.counts.get(token, 0) + 1
        ends = token in self.end_tokens
        if not ends or self.params.include_stop_str_in_output:
            self.stream.push(token)
        if ends:
            self._finish("stop", token)
        elif self.stream.stopped_by is not None:
            self._finish("stop", self.stream.stopped_by)
        elif len(self.token_ids) >= self.max_tokens:
            self._finish("length", None)

    def fail(self, reason: str) -> None:
        self._finish("error", reason)

    def cancel(self) -> None:
        self._finish("cancelled", None)

    def _finish(self, reason: str, detail: int | str | None) -> None:
        self.finish_reason, self.stop_reason = reason, detail  # first: whatever the text does, it is over
        self.metrics.finished = time.perf_counter()
        self.stream.finish()
        if self.stream.stopped_by is not None and reason == "length":
            self.finish_reason, self.stop_reason = "stop", self.stream.stopped_by

    def output(self) -> RequestOutput:
        """What there is now; its `new_text` is what came since this was last called."""
        new_text = self.stream.text[self._shown :]
        self._shown = len(self.stream.text)
        asked = self.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=self.stream.text,
            token_ids=list(self.token_ids),
            cumulative_logprob=self.cumulative_logprob if asked else None,
            logprobs=list(self.logprobs) if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            new_text=new_text,
        )
        finished = self.finish_reason is not None
        return RequestOutput(self.id, self.prompt, self.prompt_token_ids, [completion], finished, self.metrics)
