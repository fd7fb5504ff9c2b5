"""The machine's limits while something is measured: where neighbours come and go, they change by the second."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median

import numpy as np

_SETTLE_SECONDS = 0.02  # what the threads of another library take to stop spinning for work
_SHARE_BESIDE, _MAX_BESIDE_SECONDS = 0.25, 0.25  # of a call, that each of its limits is measured for on either side


class Limits:
    """What all threads together reach right now: `read` bytes a second, `fma` and `dot` operations a second."""

    def __init__(self) -> None:
        self._native = import_module("pace._kernels.roofline.roofline")
        self._buffer = np.empty(256 << 20, np.uint8)
        self._native.touch(self._buffer)
        self._items = 8
        while _rate(self._native.fma, self._items, 0)[1] < 0.01:
            self._items *= 2

    def read(self, seconds: float = 0) -> float:
        """From memory; like the others it is repeated until so much time has passed."""
        return _rate(self._native.read, self._buffer, seconds)[0]

    def fma(self, seconds: float = 0) -> float:
        """Of float32."""
        return _rate(self._native.fma, self._items, seconds)[0]

    def dot(self, seconds: float = 0) -> float:
        """Of bfloat16 pairs, where the rung has an instruction for them."""
        return _rate(self._native.dot, self._items, seconds)[0]


@dataclass(frozen=True)
class Work:
    """Something to time, and how much it does of what the limits limit: bytes read, operations."""

    call: Callable[[], object]
    amounts: Mapping[str, float]  # by limit: {"read": bytes}
    foreign: bool = False  # another library's: what comes after it waits until its threads sleep


@dataclass
class Samples:
    """One work: how long its calls took, and what the limits were beside each."""

    work: Work
    seconds: list[float] = field(default_factory=list)
    limits: dict[str, list[float]] = field(default_factory=dict)

    def rate(self, limit: str) -> float:
        return self.work.amounts[limit] / median(self.seconds)

    def share(self, limit: str) -> float:
        """Of a limit, the median over the calls."""
        both = zip(self.seconds, self.limits[limit], strict=True)
        return median(self.work.amounts[limit] / seconds / there for seconds, there in both)

    def least_seconds(self, *names: str) -> float:
        """What the machine takes for the work: whichever of these limits binds."""
        return max(self.work.amounts[name] / median(self.limits[name]) for name in names)

    def relative(self, other: "Samples") -> float:
        """How many times as long as `other` in the same round, the median."""
        return median(ours / theirs for ours, theirs in zip(self.seconds, other.seconds, strict=False))


def beside(limits: Limits, works: Mapping[str, Work], rounds: int, budget_seconds: float = 1.0) -> dict[str, Samples]:
    """Each work once a round, its limits measured right before and after; a foreign one until its budget is spent."""
    samples = {name: Samples(work) for name, work in works.items()}
    for work in works.values():
        if not work.foreign:  # those were called when they were checked
            work.call()
    for _ in range(rounds):
        for each in samples.values():
            if not each.work.foreign or sum(each.seconds) < budget_seconds:
                _sample(limits, each)
    return samples


def _sample(limits: Limits, to: Samples) -> None:
    names = list(to.work.amounts)
    # Beside a long call, long enough to see whom else the CPUs serve.
    beside_seconds = min(_SHARE_BESIDE * to.seconds[-1], _MAX_BESIDE_SECONDS) if to.seconds else 0
    before = [getattr(limits, name)(beside_seconds) for name in names]
    began = time.perf_counter()
    to.work.call()
    to.seconds.append(time.perf_counter() - began)
    if to.work.foreign:
        time.sleep(_SETTLE_SECONDS)
    for name, first in zip(names, before, strict=True):
        to.limits.setdefault(name, []).append((first + getattr(limits, name)(beside_seconds)) / 2)


def _rate(work: Callable[..., int], argument: object, seconds: float) -> tuple[float, float]:
    """How much a second, of all calls within about so many seconds, and how many seconds those were."""
    began = time.perf_counter()
    done = work(argument)
    while (passed := time.perf_counter() - began) < seconds:
        done += work(argument)
    return done / passed, passed
