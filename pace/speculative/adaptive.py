"""How many drafts pay: what they are expected to bring, against what a step of more rows takes.

Both are learned from the steps before. A draft is expected to be right with the rate at which those of its text were
lately; the seconds of a step are known as a function of its rows, for about as many texts as there are. What is tried
without paying is counted, and may not add up to more than ALLOWED of the time.

What a draft model has to read of a text, its prompt most of all, is an investment in that text. It is made where drafts
are known to be good and the text is long enough to repay it, as long as earlier ones were repaid; and else to find out,
as READING of the time allows.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Text

Doubles = NDArray[np.float64]

ALLOWED = 0.012  # of the time, for trials that do not pay
READING = 0.008  # of the time, for reading on trial
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
KNOWN = 8.0  # drafts after which the rate of all is known
HORIZON = 256  # tokens within which what is read of a text has to be repaid
REPAID = 0.9  # the weight of what is known of earlier texts, when one that was read ends
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
        known, seconds = self._drawn()
        i = bisect_left(known, count)
        if i == 0:
            return seconds[0]
        # Past the last point as steep as from the first to it.
        low, high = (i - 1, i) if i < len(known) else (0, -1)
        slope = (seconds[high] - seconds[low]) / max(known[high] - known[low], 1)
        return seconds[i - 1] + slope * (count - known[i - 1])

    def of(self, counts: Doubles) -> Doubles:
        """The same for several."""
        known, seconds = self._drawn()
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
    reading: bool = False  # what was begun is brought to its end
    invested: float = 0.0  # seconds of reading
    returned: float = 0.0  # seconds that its drafts have won

    @property
    def waited(self) -> bool:
        """Long enough to be tried again."""
        return self.idle >= self.wait


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
        self._reading = 0.0  # seconds a token
        self._allowance = 0.0  # seconds for reading on trial; below 0 there is none
        self._invested = self._returned = 0.0  # of the texts that were read and have ended
        self.seconds = self.plain_seconds = 0.0  # of steps that only decoded, and what they would have taken without

    def forget(self, text: Text) -> None:
        record = self._records.pop(text, None)
        if record is not None and record.invested:
            self._invested = REPAID * self._invested + record.invested
            self._returned = REPAID * self._returned + record.returned

    def worth_reading(self, texts: Sequence[Text], limits: Sequence[int], unread: Sequence[int]) -> list[int]:
        """Which texts are to be read, by index, of those with unread[i] tokens. limits: drafts until a text's end."""
        kind, records = self._class_of(len(texts)), self._records_of(texts)
        begun = [i for i, record in enumerate(records) if record.reading]
        known = self._all.right + self._all.wrong >= KNOWN and self._returned >= self._invested
        may_try = not begun and self._allowance >= 0
        if kind.plain < 2 or not any(unread) or not (known or may_try):
            return begun
        counts, gain = self._best(kind, records, self._most(kind, limits))
        saved = (1 - 1 / gain) * kind.steps.at(len(texts)) / len(texts)  # seconds, by a token of a text
        cold = [i for i, count in enumerate(unread) if count and limits[i]]
        repaid = [i for i in cold if counts[i] and saved * min(limits[i], HORIZON) > self._reading * unread[i]]
        chosen = {*begun, *repaid} if known else set(begun)
        if may_try and not chosen:
            chosen.update(sorted((i for i in cold if counts[i] or records[i].waited), key=lambda i: unread[i])[:1])
        for i in chosen:
            records[i].reading = True
        return sorted(chosen)

    def observe_reading(
        self, texts: Sequence[Text], unread: Sequence[int], left: Sequence[int], seconds: float
    ) -> None:
        """What it took to read what was unread of some texts, but for what is left of each."""
        self._allowance -= seconds
        self.seconds += seconds
        self._reading = seconds / max(sum(unread) - sum(left), 1)
        for record, before, after in zip(self._records_of(texts), unread, left, strict=True):
            record.invested += self._reading * (before - after)
            record.reading = after > 0

    def choose(self, texts: Sequence[Text], limits: Sequence[int]) -> list[int]:
        """How many drafts each text gets, at most limits[i]."""
        kind, records = self._class_of(len(texts)), self._records_of(texts)
        none = [0] * len(texts)
        alone = kind.steps.at(len(texts))
        if kind.plain < 2 or kind.since >= kind.again or self._debt > CREDIT * alone:
            return none
        most = self._most(kind, limits)
        counts, gain = self._best(kind, records, most)
        if any(counts):
            kind.again = min(max((gain - 1) / LOSS, PLAIN_AGAIN[0]), PLAIN_AGAIN[1])
        if self._debt <= 0:
            for i, record in enumerate(records):
                if counts[i] == 0 and record.waited:
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
        kind, records, total = self._class_of(len(texts)), self._records_of(texts), sum(drafted)
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
        self._account(kind, records, drafted, accepted, proposing, step)

    def observe_proposing(self, texts: Sequence[Text], number: int, depth: int, seconds: float) -> None:
        """What the drafts of some of `number` texts took, of which one got `depth`. The first time is unlike others."""
        records = self._records_of(texts)
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

    def _records_of(self, texts: Sequence[Text]) -> list[Record]:
        return [self._records.setdefault(text, Record(Rate())) for text in texts]

    def _most(self, kind: Class, limits: Sequence[int]) -> NDArray[np.int64]:
        return np.minimum(limits, min(self._num_tokens, 2 * kind.reach))

    def _best(self, kind: Class, records: Sequence[Record], most: NDArray[np.int64]) -> tuple[list[int], float]:
        """One draft more for the text where it is likeliest to be reached and right, as long as tokens come faster; and
        how much faster that is.
        """
        number, rates = len(records), np.array([self._expected(record) for record in records])
        none = [0] * number, 1.0
        depths = np.arange(1, int(most.max(initial=0)) + 1)
        chances = np.where(depths <= most[:, None], rates[:, None] ** depths, 0.0).ravel()
        order = np.argsort(-chances, kind="stable")[: int(most.sum())]
        tokens: Doubles = number + chances[order].cumsum()
        reached = np.maximum.accumulate(order % max(len(depths), 1) + 1)
        rows: Doubles = number + 1.0 + np.arange(len(order), dtype=np.float64)
        seconds = kind.steps.of(rows) + kind.proposing.of(reached.astype(np.float64))
        if not len(order):
            return none
        speed = tokens / seconds
        best = int(speed.argmax())
        gain = float(speed[best] * kind.steps.at(number) / number)
        if gain < WORTH:
            return none
        counts: list[int] = np.bincount(order[: best + 1] // len(depths), minlength=number).tolist()
        return counts, gain

    def _account(
        self,
        kind: Class,
        records: Sequence[Record],
        drafted: Sequence[int],
        accepted: Sequence[int],
        proposing: float,
        step: float | None,
    ) -> None:
        if not kind.plain:
            return
        number, total = len(records), sum(drafted)
        alone = kind.steps.at(number)
        took = step if step is not None and total else kind.steps.at(number + total)
        cost, worth = took - alone + proposing, alone / number
        won = sum(accepted) * worth
        self._debt = max(self._debt + cost - won - ALLOWED * alone, -BONUS * alone)
        self._allowance = min(self._allowance + READING * alone + max(won - cost, 0), 0)
        for record, tried, right in zip(records, drafted, accepted, strict=True):
            if tried and record.invested:
                record.returned += right * worth - cost * tried / total
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
