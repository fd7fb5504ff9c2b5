"""The machine's limits, measured: what no kernel can beat. Bytes read from memory, multiply-adds on registers."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from . import host, isa

_Work = Callable[[], int]  # does bytes or floating-point operations, and says how many

_MIN_BUFFER_BYTES, _MAX_BUFFER_BYTES = 256 << 20, 4 << 30
_BURST_SECONDS = 0.005  # long enough to hide that a parallel region starts and ends
_MATMUL_SIZE = 768


@dataclass(frozen=True)
class Roofline:
    """The best rates that were measured, of all threads together."""

    read_bytes_per_second: float
    fma_flops: float  # floating-point operations a second, float32
    bf16_flops: float  # the same with bfloat16 inputs; the rung avx512 has an instruction for it
    num_threads: int
    rung: str  # "reference": what NumPy reaches, on as many threads as its BLAS takes

    def shortest_seconds(self, num_bytes: int, flops: int = 0, *, bf16: bool = False) -> float:
        """The least time that work of this size takes here."""
        return max(num_bytes / self.read_bytes_per_second, flops / (self.bf16_flops if bf16 else self.fma_flops))


def measure(num_threads: int | None = None, seconds: float = 0.5) -> Roofline:
    """The best of several interleaved rounds within about `seconds`, on `num_threads` (None: as kernels use)."""
    if isa.RUNG == "reference":
        return _measure_numpy(seconds)
    with _threads(num_threads or isa.get_num_threads()) as count:
        return _measure_native(count, seconds)


def best(a: Roofline, b: Roofline) -> Roofline:
    """The better of each number of two measurements on the same rung and threads."""
    assert (a.rung, a.num_threads) == (b.rung, b.num_threads)
    return replace(
        a,
        read_bytes_per_second=max(a.read_bytes_per_second, b.read_bytes_per_second),
        fma_flops=max(a.fma_flops, b.fma_flops),
        bf16_flops=max(a.bf16_flops, b.bf16_flops),
    )


def _measure_native(num_threads: int, seconds: float) -> Roofline:
    native = import_module("pace._kernels.roofline.roofline")
    deadline = time.perf_counter() + seconds
    buffer = np.empty(_buffer_bytes(), np.uint8)
    native.touch(buffer)  # by the threads that read it, so that its pages are near them
    items = num_threads * _items_of_a_burst(native.fma)
    read, fma, dot = _best_rates(
        [lambda: native.read(buffer), lambda: native.fma(items), lambda: native.dot(items)],
        deadline,
    )
    return Roofline(read, fma, dot, num_threads, import_module("pace._kernels.runtime").get_rung())


def _measure_numpy(seconds: float) -> Roofline:
    deadline = time.perf_counter() + seconds
    buffer = np.ones(_MIN_BUFFER_BYTES // 8)
    a = np.ones((_MATMUL_SIZE, _MATMUL_SIZE), np.float32)
    out = np.empty_like(a)
    read, flops = _best_rates([lambda: _read_numpy(buffer), lambda: _matmul_numpy(a, out)], deadline)
    return Roofline(read, flops, flops, isa.get_num_threads(), "reference")


def _read_numpy(buffer: NDArray[np.float64]) -> int:
    np.add.reduce(buffer)
    return buffer.nbytes


def _matmul_numpy(a: NDArray[np.float32], out: NDArray[np.float32]) -> int:
    np.matmul(a, a, out=out)
    return 2 * len(a) ** 3


def _best_rates(works: list[_Work], deadline: float, min_rounds: int = 3) -> list[float]:
    """Each work's best rate over rounds of all of them; at least `min_rounds`, then until the deadline."""
    rates = [0.0] * len(works)
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < deadline:
        rates = [max(rate, _rate(work)) for rate, work in zip(rates, works, strict=True)]
        rounds += 1
    return rates


def _rate(work: _Work) -> float:
    start = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - start)


def _items_of_a_burst(work: Callable[[int], int]) -> int:
    """How many items take one thread a burst. One, since threads that wait for a descheduled one look slow."""
    items = 8
    with _threads(1):
        while min(_seconds(work, items) for _ in range(3)) < _BURST_SECONDS:
            items *= 2
    return items


def _seconds(work: Callable[[int], int], items: int) -> float:
    start = time.perf_counter()
    work(items)
    return time.perf_counter() - start


def _buffer_bytes() -> int:
    """Far more than all caches hold together, and a small share of memory."""
    machine = host.describe()
    wanted = max(_MIN_BUFFER_BYTES, 4 * (machine.l3_total_bytes or 0))
    free = machine.memory_available_bytes or machine.memory_bytes or wanted * 4
    return min(wanted, _MAX_BUFFER_BYTES, free // 4)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[int]:
    before = isa.asked_num_threads()
    isa.set_num_threads(count)
    try:
        yield count
    finally:
        isa.set_num_threads(before)
