"""How many drafts pay: what they are expected to bring, against what a step of more rows takes.

Both are learned from the steps before. A draft is expected to be right with the rate at which those of its text were
lately; the seconds of a step are known as a function of its rows, for about as many texts as there are. What is tried
without paying is counted, and may not add up to more than ALLOWED of the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Text

Doubles = NDArray[np.float64]

ALLOWED = 0.015  # of the time, for trials that do not pay
CREDIT = 1.0  # steps without drafts that trials may cost beyond that
BONUS = 5.0  # steps of what was won that make up for later trials, at most
WORTH = 1.03  # how much faster a step has to be expected to be
FIRST = 2  # drafts a text in the first trial; each doubles what was tried before
PROBE = 2  # drafts a text that is tried again
WAITS = (8, 64)  # steps before a text is tried again, from the first time on doubled
PLAIN_AGAIN = (8, 256)  # steps with drafts before one without is measured again, at least and at most
LOSS = 0.008  # of the time, by such measurements
NEWEST = 0.1  # the weight of the newest step in a time
DRIFT = 0.03  # its weight in all times: the machine is busy, the texts are longer
OUTLIER = 2.0  # times what was expected, beyond which a step counts as that
FORGET = 0.9  # of what is known of a text's drafts, at each verification
FORGET_ALL = 0.995  # of what is known of all drafts
PRIOR = 0.7, 4.0  # the rate before anything is known, and how many drafts that is worth
TRUST = 2.0  # drafts that the rate of all is worth, for one text


class Times:
    """Seconds as a function of a count, as measured: a line through the points, that never falls."""

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float, int]] = {}  # bucket → mean count, seconds, measurements
        self._line: tuple[list[float], list[float]] | None = None

    def copy(self) -> "Times":
        """To begin with: any measurement weighs more than all that is taken over."""
        other = Times()
        other._points = {bucket: (count, seconds, 0) for bucket, (count, seconds, _) in self._points.items()}
        return other

    def observe(self, count: int, seconds: float) -> None:
        bucket, seconds = bucket_of(count), max(seconds, 1e-9)
        if bucket not in self._points:
            self._points[bucket] = count, seconds, 1
        else:
            mean, known, times = self._points[bucket]
            seconds = min(max(seconds, known / OUTLIER), known * OUTLIER)
            if times:
                drift = (seconds / known) ** DRIFT
                self._points = {key: (n, s * drift, t) for key, (n, s, t) in self._points.items()}
            weight = max(NEWEST, 1 / (times + 1))
            known = self._points[bucket][1]
            self._points[bucket] = mean + weight * (count - mean), known + weight * (seconds - known), times + 1
        self._line = None

    def at(self, count: float) -> float:
        """0 where nothing is known."""
        return float(self.of(np.array([count]))[0])

    def of(self, counts: Doubles) -> Doubles:
        """The same for several."""
        known, seconds = self._drawn()
        # Past the last point as steep as from the first to it.
        slope = (seconds[-1] - seconds[0]) / max(known[-1] - known[0], 1)
        return np.interp(counts, known, seconds) + slope * np.maximum(counts - known[-1], 0)

    def _drawn(self) -> tuple[list[float], list[float]]:
        if self._line is None:
            points = sorted((count, seconds) for count, seconds, _ in self._points.values()) or [(0.0, 0.0)]
            rising = np.maximum.accumulate([seconds for _, seconds in points]).tolist()
            self._line = [count for count, _ in points], rising
        return self._line


def bucket_of(count: int) -> int:
    """Neighbours of more than 16 are counted as one, an eighth apart."""
    shift = max(count.bit_length() - 4, 0)
    return count >> shift << shift


@dataclass
class Rate:
    """Of right ones among drafts."""

    right: float = 0.0
    wrong: float = 0.0

    def observe(self, accepted: int, drafted: int, forget: float) -> None:
        """Behind the first wrong draft, nothing is known of the others."""
        self.right = self.right * forget + accepted
        self.wrong = self.wrong * forget + (accepted < drafted)

    def given(self, prior: float, worth: float) -> float:
        return (self.right + prior * worth) / (self.right + self.wrong + worth)


@dataclass
class Record:
    """What is known of a text."""

    rate: Rate
    idle: int = 0  # steps since there were drafts
    wait: int = WAITS[0]
    begun: bool = False  # had drafts before


@dataclass
class Class:
    """What is known of steps of about as many texts."""

    steps: Times  # by rows
    proposing: Times  # by the drafts of the text that gets most
    reach: int = FIRST  # drafts a text, so far
    plain: int = 0  # steps without drafts
    since: int = 0  # with drafts since then
    again: float = PLAIN_AGAIN[0]  # how many it may be


class Adaptive:
    """Chooses the number of drafts, and learns from what comes of them."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._all, self._records = Rate(), dict[Text, Record]()
        self._classes: dict[int, Class] = {}
        self._debt = 0.0  # seconds that drafts took beyond what they brought
        self.seconds = self.plain_seconds = 0.0  # of steps that only decoded, and what they would have taken without

    def forget(self, text: Text) -> None:
        self._records.pop(text, None)

    def worth_reading(self, text: Text) -> bool:
        """Whether a text that begins is likely to get drafts."""
        return self._records.get(text) is None and self._expected(Record(Rate())) > 0.3 and self._debt <= 0

    def choose(self, texts: Sequence[Text], limits: Sequence[int]) -> list[int]:
        """How many drafts each text gets, at most limits[i]."""
        kind = self._class_of(len(texts))
        records = [self._records.setdefault(text, Record(Rate())) for text in texts]
        none = [0] * len(texts)
        alone = kind.steps.at(len(texts))
        if kind.plain < 2 or kind.since >= kind.again or self._debt > CREDIT * alone:
            return none
        most = np.minimum(limits, min(self._num_tokens, 2 * kind.reach))
        counts = self._best(kind, np.array([self._expected(record) for record in records]), most)
        if self._debt <= 0:
            for i, record in enumerate(records):
                if counts[i] == 0 and record.idle >= record.wait:
                    counts[i] = min(PROBE, int(most[i]))
        return counts

    def observe(
        self,
        texts: Sequence[Text],
        drafted: Sequence[int],
        accepted: Sequence[int],
        proposing: float,
        step: float | None,
    ) -> None:
        """What came of a step. proposing, step: seconds; None where prompts were in the batch."""
        kind, total = self._class_of(len(texts)), sum(drafted)
        records = [self._records.setdefault(text, Record(Rate())) for text in texts]
        for record, tried, right in zip(records, drafted, accepted, strict=True):
            self._note(record, tried, right)
        if total:
            kind.since += 1
            kind.reach = max(kind.reach, *drafted)
        if step is not None:
            kind.steps.observe(len(texts) + total, step)
            if not total:
                kind.plain += 1
                kind.since = 0
        self._account(kind, len(texts), total, sum(accepted), proposing, step)

    def observe_proposing(self, texts: Sequence[Text], number: int, depth: int, seconds: float) -> None:
        """What the drafts of some of `number` texts took, of which one got `depth`. The first time is unlike others."""
        records = [self._records.setdefault(text, Record(Rate())) for text in texts]
        if all(record.begun for record in records):
            self._class_of(number).proposing.observe(depth, seconds)
        for record in records:
            record.begun = True

    def _note(self, record: Record, drafted: int, accepted: int) -> None:
        if not drafted:
            record.idle += 1
            return
        record.rate.observe(accepted, drafted, FORGET)
        self._all.observe(accepted, drafted, FORGET_ALL)
        waits = WAITS[0] if accepted else min(2 * record.wait, WAITS[1])
        record.idle, record.wait = 0, waits

    def _expected(self, record: Record) -> float:
        return record.rate.given(self._all.given(*PRIOR), TRUST)

    def _best(self, kind: Class, rates: Doubles, most: NDArray[np.int64]) -> list[int]:
        """One draft more for the text where it is likeliest to be reached and right, as long as tokens come faster."""
        number = len(rates)
        depths = np.arange(1, int(most.max(initial=0)) + 1)
        chances = np.where(depths <= most[:, None], rates[:, None] ** depths, 0.0).ravel()
        order = np.argsort(-chances, kind="stable")[: int(most.sum())]
        tokens: Doubles = number + chances[order].cumsum()
        reached = np.maximum.accumulate(order % max(len(depths), 1) + 1)
        rows: Doubles = number + 1.0 + np.arange(len(order), dtype=np.float64)
        seconds = kind.steps.of(rows) + kind.proposing.of(reached.astype(np.float64))
        if not len(order):
            return [0] * number
        speed = tokens / seconds
        best = int(speed.argmax())
        gain = speed[best] * kind.steps.at(number) / number
        if gain < WORTH:
            return [0] * number
        kind.again = min(max((gain - 1) / LOSS, PLAIN_AGAIN[0]), PLAIN_AGAIN[1])
        counts: list[int] = np.bincount(order[: best + 1] // len(depths), minlength=number).tolist()
        return counts

    def _account(
        self, kind: Class, number: int, drafted: int, accepted: int, proposing: float, step: float | None
    ) -> None:
        if not kind.plain:
            return
        alone = kind.steps.at(number)
        took = step if step is not None and drafted else kind.steps.at(number + drafted)
        cost = took - alone + proposing
        won = accepted * alone / number
        self._debt = max(self._debt + cost - won - ALLOWED * alone, -BONUS * alone)
        if step is not None:
            self.seconds += step + proposing
            self.plain_seconds += alone + won

    def _class_of(self, texts: int) -> Class:
        """By bits; a new one begins with what its nearest neighbour knows."""
        bits = texts.bit_length()
        if bits not in self._classes:
            near = min(self._classes, key=lambda other: abs(other - bits), default=None)
            known = Class(Times(), Times()) if near is None else self._classes[near]
            self._classes[bits] = Class(known.steps.copy(), known.proposing.copy(), known.reach)
        return self._classes[bits]
