"""From answers to percentiles. Times are seconds.

    due ──── first text ── text ── text ── end       n tokens of output
     └─ TTFT ──┘   └─ gap ─┘                         E2E = end - due
                                                     TPOT = (end - first text) / (n - 1)

`due` is when a request should have gone out (at a given rate), or went out (at a given concurrency): what a server that
falls behind makes others wait for counts as latency (no coordinated omission).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from .load import Exchange
from .stream import Answer, answer_of, body_reads, head_of


@dataclass(frozen=True)
class Outcome:
    """Of one request; with an `error`, nothing but that, `due`, `lag` and `end` counts."""

    due: float
    end: float
    lag: float = 0.0  # by which it went out late
    ttft: float = math.nan
    gaps: tuple[float, ...] = ()  # between events that brought text
    prompt_tokens: int = 0
    output_tokens: int = 0
    asked_tokens: int = 0
    counted: bool = True  # by the server; else events are taken for tokens
    error: str | None = None

    @property
    def e2e(self) -> float:
        return self.end - self.due

    @property
    def tpot(self) -> float | None:
        """None for a text of one token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def outcome_of(exchange: Exchange, asked_tokens: int) -> Outcome:
    due, lag, reply = exchange.due, exchange.sent - exchange.due, exchange.reply

    def failed(error: str) -> Outcome:
        return Outcome(due, exchange.ended, lag, asked_tokens=asked_tokens, error=error)

    if reply is None:
        return failed(exchange.error or "no answer")
    head = head_of(reply.raw)
    if head is None:
        return failed("connection lost")
    if head.status != 200:
        return failed(f"HTTP {head.status}")
    try:
        answer = answer_of(body_reads(reply.reads, head))
    except ValueError:
        return failed("not a stream of events")
    if answer.error:
        return failed(answer.error)
    if not reply.complete or answer.end is None:
        return failed("cut short")
    return _outcome(answer, answer.end, due, lag, asked_tokens)


def _outcome(answer: Answer, end: float, due: float, lag: float, asked_tokens: int) -> Outcome:
    first = answer.text_times[0] if answer.text_times else end
    return Outcome(
        due,
        end,
        lag,
        ttft=first - due,
        gaps=tuple(after - before for before, after in pairwise(answer.text_times)),
        prompt_tokens=answer.prompt_tokens or 0,
        output_tokens=len(answer.text_times) if answer.output_tokens is None else answer.output_tokens,
        asked_tokens=asked_tokens,
        counted=answer.output_tokens is not None,
    )


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles":
        """NaN of nothing."""
        found = np.fromiter(values, float)
        return cls(*(float(p) for p in np.percentile(found, (50, 90, 99)))) if len(found) else cls(*[math.nan] * 3)


@dataclass(frozen=True)
class Objective:
    """What a request must keep to in order to count as good."""

    ttft: float = math.inf
    tpot: float = math.inf

    def met(self, outcome: Outcome) -> bool:
        return outcome.error is None and outcome.ttft <= self.ttft and (outcome.tpot or 0) <= self.tpot


@dataclass(frozen=True)
class Point:
    """One load: `level` requests a second ("rate") or at a time ("concurrency")."""

    kind: str
    level: float
    requests: int
    seconds: float
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    asked_tokens: int  # of output, by the requests that were answered
    counted: bool
    ttft: Percentiles
    tpot: Percentiles
    gap: Percentiles
    e2e: Percentiles
    lag: Percentiles
    good: int | None  # requests within the objective, if there is one
    client_seconds: float  # of a CPU

    @property
    def answered(self) -> int:
        return self.requests - sum(self.errors.values())

    @property
    def refused(self) -> int:
        return self.errors.get("HTTP 429", 0)

    @property
    def other_errors(self) -> int:
        return sum(self.errors.values()) - self.refused

    @property
    def request_rate(self) -> float:
        return self.answered / self.seconds

    @property
    def output_rate(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def goodput(self) -> float | None:
        return None if self.good is None else self.good / self.seconds


def summary(
    kind: str,
    level: float,
    outcomes: Sequence[Outcome],
    objective: Objective | None = None,
    client_seconds: float = 0.0,
) -> Point:
    answered = [each for each in outcomes if each.error is None]
    return Point(
        kind,
        level,
        requests=len(outcomes),
        seconds=max(each.end for each in outcomes) - min(each.due for each in outcomes),
        errors=dict(Counter(each.error for each in outcomes if each.error is not None)),
        prompt_tokens=sum(each.prompt_tokens for each in answered),
        output_tokens=sum(each.output_tokens for each in answered),
        asked_tokens=sum(each.asked_tokens for each in answered),
        counted=all(each.counted for each in answered),
        ttft=Percentiles.of(each.ttft for each in answered),
        tpot=Percentiles.of(each.tpot for each in answered if each.tpot is not None),
        gap=Percentiles.of(chain.from_iterable(each.gaps for each in answered)),
        e2e=Percentiles.of(each.e2e for each in answered),
        lag=Percentiles.of(each.lag for each in outcomes),
        good=None if objective is None else sum(map(objective.met, outcomes)),
        client_seconds=client_seconds,
    )
