"""What a user asked for, and what they get to see of it: a request, which is one sequence for each of its texts."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pace.reference.arrays import Float

from .pooling import Pool
from .sampling_params import SamplingParams
from .sequence import Sequence


class Logprob(NamedTuple):
    """Of one token at one place: its log-probability, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str


Logprobs = dict[int, Logprob]


@dataclass
class Metrics:
    """Seconds of time.perf_counter."""

    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    finished: float | None = None
    # With speculation, of all texts: drafts, those of them that were right, and steps of a text that had any.
    drafted: int = 0
    accepted: int = 0
    verifications: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens that a step with drafts brought, the one among them that is drawn in any case."""
        return 1 + self.accepted / self.verifications if self.verifications else None

    def add_drafts(self, drafted: int, accepted: int) -> None:
        """Of one text in one step."""
        self.drafted += drafted
        self.accepted += accepted
        self.verifications += 1


@dataclass(frozen=True)
class Usage:
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int  # of all texts, those that best_of leaves out too
    cached_tokens: int  # of the prompt's, those that the cache had already

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass
class CompletionOutput:
    """What the model wrote, so far. Log-probabilities are natural logarithms; None where they were not asked for."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[Logprobs] | None
    finish_reason: str | None  # "stop", "length", "cancelled", "error"
    stop_reason: int | str | None  # the token or the string that stopped it, or what went wrong
    new_text: str = ""  # since the output before this one, when streaming


@dataclass
class RequestOutput:
    """A request as its user sees it; `prompt` is None where token ids were given.

    prompt_logprobs has None for the first token of the prompt, which nothing comes before.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Metrics
    usage: Usage
    prompt_logprobs: list[Logprobs | None] | None = None


@dataclass
class EmbeddingOutput:
    """An embedded prompt; `prompt` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    embedding: Float | None  # (hidden,) float32; None where it was cancelled or went wrong
    finish_reason: str | None  # "stop", "cancelled", "error"
    stop_reason: int | str | None  # what went wrong
    metrics: Metrics
    usage: Usage


@dataclass(eq=False)
class Request:
    """`priority`: the lower number goes first, and among equals who came first.

    With a `pool` it is for the embedding of its prompt: its one sequence has no room for output, and ends when the
    prompt has been through the model.
    """

    id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[Sequence]
    priority: int = 0
    prompt_logprobs: list[Logprobs | None] = field(default_factory=lambda: [None])
    cached_tokens: int | None = None  # when it was first let in
    metrics: Metrics = field(default_factory=Metrics)
    arrival: int | None = None  # the engine's count of requests, once it is there
    pool: Pool | None = None
    embedding: Float | None = None  # once it has ended well
    _shown: dict[int, int] = field(default_factory=dict)  # characters, by sequence
    _told: dict[int, tuple[int, bool]] = field(default_factory=dict)  # tokens, and whether of its end

    def __post_init__(self) -> None:
        for sequence in self.sequences:
            sequence.request = self
        self.followers = self.sequences[1:]  # those that wait for the first to have been through the prompt

    @property
    def begun(self) -> bool:
        """Whether it was let in, even if some or all of its texts wait again."""
        return self.cached_tokens is not None

    @property
    def missing_prompt_logprobs(self) -> bool:
        """Whether the prompt has tokens whose log-probabilities are asked for and not known yet."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_token_ids)

    @property
    def whole_prompt(self) -> bool:
        """Whether all of the prompt goes through the model: the cache does not have what is asked of its tokens."""
        return self.missing_prompt_logprobs or (self.pool is not None and self.pool.needs_all)

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def num_output_tokens(self) -> int:
        """Of all texts."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt_token_ids), self.num_output_tokens, self.cached_tokens or 0)

    def embedding_output(self) -> EmbeddingOutput:
        """Of a request with a pool."""
        (sequence,) = self.sequences
        return EmbeddingOutput(
            self.id,
            self.prompt,
            self.prompt_token_ids,
            self.embedding,
            sequence.finish_reason,
            sequence.stop_reason,
            self.metrics,
            self.usage,
        )

    def output(self) -> RequestOutput:
        """What there is now; each `new_text` is what came since this was last called."""
        params = self.params
        return RequestOutput(
            self.id,
            self.prompt,
            self.prompt_token_ids,
            [self._completion(i, sequence) for i, sequence in enumerate(self._chosen())],
            self.finished,
            self.metrics,
            self.usage,
            None if params.prompt_logprobs is None else list(self.prompt_logprobs),
        )

    def news(self) -> Iterator[tuple[int, str, list[int], list[Logprobs] | None, str | None, int | str | None]]:
        """What came to each text since this was last called, where anything did: its index, text, tokens, their
        log-probabilities, and how it ended.
        """
        for index, sequence in enumerate(self._chosen()):
            seen, told = self._told.get(sequence.index, (0, False))
            ended = sequence.finish_reason is not None
            if told or (seen == len(sequence.token_ids) and not ended):
                continue
            self._told[sequence.index] = len(sequence.token_ids), ended
            shown, self._shown[sequence.index] = self._shown.get(sequence.index, 0), len(sequence.stream.text)
            logprobs = None if self.params.logprobs is None else sequence.logprobs[seen:]
            yield (
                index,
                sequence.stream.text[shown:],
                sequence.token_ids[seen:],
                logprobs,
                sequence.finish_reason,
                sequence.stop_reason,
            )

    def _chosen(self) -> Iterable[Sequence]:
        """The texts that are shown: of best_of, those with the highest log-probability a token; last those that went
        wrong or never began.
        """
        if not self.params.chooses:
            return self.sequences
        return sorted(
            self.sequences,
            key=lambda each: (each.finish_reason == "error" or not each.token_ids, -each.mean_logprob),
        )[: self.params.n]

    def _completion(self, index: int, sequence: Sequence) -> CompletionOutput:
        text, shown = sequence.stream.text, self._shown.get(sequence.index, 0)
        self._shown[sequence.index] = len(text)
        asked = self.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=list(sequence.token_ids),
            cumulative_logprob=sequence.cumulative_logprob if asked else None,
            logprobs=list(sequence.logprobs) if asked else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            new_text=text[shown:],
        )
