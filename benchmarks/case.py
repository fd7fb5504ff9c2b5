"""One case of a benchmark: the forms of an operation, checked against one another, then timed side by side."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from itertools import cycle
from typing import Any

import ml_dtypes
import numpy as np

from pace.host import Host

Form = Callable[..., Any]

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
KINDS = [BF16, F32]
# Two roundings of nearly the same float32 to bfloat16: one unit in the last place. float32: the order of a sum.
RTOL = {BF16: 2**-7, F32: 1e-5}

_SETTLE_SECONDS = 0.01  # what the threads of another library take to stop spinning for work
_MAX_COPIES_BYTES = 1 << 30
_LONGEST_CALL_SECONDS = 5.0  # of a peer


@dataclass(frozen=True)
class Result:
    """A case, timed. Seconds are medians of single calls; None where there is no such peer."""

    operation: str
    shape: str
    dtype: str
    rung: str
    native_seconds: float
    reference_seconds: float
    torch_seconds: float | None
    num_bytes: int
    flops: int
    cache: str | None  # the cache that holds everything the case touches, if any does


@dataclass
class Runner:
    """A form with arguments of its own, and how long its calls took."""

    form: Form
    arguments: Sequence[tuple[Any, ...]]  # equal copies, taken in turn: several where memory should be cold
    budget_seconds: float
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turns = cycle(self.arguments)

    def call_once(self) -> float:
        arguments = next(self.turns)
        start = time.perf_counter()
        self.form(*arguments)
        return time.perf_counter() - start

    def settle(self) -> float:
        """Call until other libraries' threads sleep and the caches are this form's; returns the last call's time."""
        start = time.perf_counter()
        while True:
            seconds = self.call_once()
            if time.perf_counter() - start > _SETTLE_SECONDS:
                return seconds

    def run_block(self, seconds: float) -> None:
        """Time calls for about so long, and none once the budget is spent: a slow form is timed once."""
        if sum(self.seconds) > self.budget_seconds:
            return
        settled = self.settle()
        if settled > seconds:
            self.seconds.append(settled)
            return
        deadline = time.perf_counter() + seconds
        while True:
            self.seconds.append(self.call_once())
            if time.perf_counter() > deadline:
                return


def draw(*shape: int, kind: np.dtype = F32, seed: int = 0) -> np.ndarray:
    """Normal values, exact in bfloat16 so that both dtypes see the same numbers."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(BF16).astype(kind)


def draw_weight(out_features: int, in_features: int, *, kind: np.dtype) -> np.ndarray:
    """A weight that leaves numbers of size 1 at size 1, about; exact in bfloat16."""
    size = 2.0 ** -round(np.log2(in_features) / 2)
    return draw(out_features, in_features, kind=kind, seed=1) * np.array(size, kind)


def parts(argument: Any) -> Iterator[np.ndarray]:
    """The arrays in an argument or a result: itself, or those in its fields (of a packed weight, of a History)."""
    if isinstance(argument, np.ndarray):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for each in argument:
            yield from parts(each)
    elif is_dataclass(argument):
        for each in fields(argument):
            yield from parts(getattr(argument, each.name))


def rebuilt(argument: Any, change: Callable[[np.ndarray], Any]) -> Any:
    """The argument with each of its arrays changed."""
    if isinstance(argument, np.ndarray):
        return change(argument)
    if isinstance(argument, tuple):
        changed = [rebuilt(each, change) for each in argument]
        return type(argument)(*changed) if hasattr(argument, "_fields") else tuple(changed)
    if is_dataclass(argument):
        return type(argument)(**{each.name: rebuilt(getattr(argument, each.name), change) for each in fields(argument)})
    return argument


def copies(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(rebuilt(each, np.copy) for each in arguments)


def cold_copies(arguments: Sequence[Any], machine: Host) -> list[tuple[Any, ...]]:
    """So many copies that, taken in turn, each comes from memory."""
    each = max(1, sum(array.nbytes for array in parts(arguments)))
    wanted = 4 * (machine.l3_total_bytes or 32 << 20)
    return [copies(arguments) for _ in range(1 + min(wanted, _MAX_COPIES_BYTES) // each)]


def kind_of(arguments: Sequence[Any]) -> np.dtype:
    """The dtype that a case is about: float32 or bfloat16 where there is one, not that of indices."""
    dtypes = [array.dtype for array in parts(arguments)]
    return next((dtype for dtype in dtypes if dtype in KINDS), dtypes[0])


def assert_twins_agree(native: Form, reference: Form, arguments: Sequence[Any], *, rtol: float, atol: float) -> None:
    """Same results, and same contents of every argument afterwards: an operation may work in place."""
    left, right = copies(arguments), copies(arguments)
    results = list(parts(native(*left))), list(parts(reference(*right)))
    assert len(results[0]) == len(results[1]), "the native form returns something else than its twin"
    for ours, theirs in zip((*results[0], *parts(left)), (*results[1], *parts(right)), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if ours.tobytes() != theirs.tobytes():  # most arguments are large, and unchanged
            np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol=rtol, atol=atol)


def time_side_by_side(benchmark: Any, native: Runner, peers: Sequence[Runner], *, blocks: int) -> None:
    """Time `native` through pytest-benchmark, with the peers' blocks spread among its rounds."""
    seconds = native.budget_seconds / blocks
    settled = native.settle()
    rounds = max(blocks, min(1000 * blocks, int(native.budget_seconds / settled)))
    every = rounds // blocks
    round_index = 0

    def before_a_round() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal round_index
        if round_index % every == 0:
            for peer in peers:
                peer.run_block(seconds)
            if settled <= seconds:  # else a call is long enough to do without
                native.settle()
        round_index += 1
        return next(native.turns), {}

    benchmark.pedantic(native.form, setup=before_a_round, rounds=rounds)


def has_torch(num_threads: int) -> bool:
    """Whether torch is there; it takes as many threads as the kernels do."""
    try:
        import torch
    except ModuleNotFoundError:
        return False
    torch.set_num_threads(num_threads)
    return True


def torch_form(form: Form) -> Form:
    """`form` without autograd."""
    import torch

    return torch.inference_mode()(form)


@cache
def torch_flops(kind: np.dtype, num_threads: int) -> float:
    """About what torch's products reach. Without an instruction for bfloat16, it may be 0.2 GFLOP/s."""
    import torch

    tokens, features = 32, 512
    product = Runner(
        torch_form(torch.nn.functional.linear),
        [tensors((draw(tokens, features, kind=kind), draw(features, features, kind=kind)))],
        budget_seconds=0.1,
    )
    product.settle()
    return 2 * tokens * features**2 / min(product.call_once() for _ in range(10))


def is_affordable(flops: int, kind: np.dtype, num_threads: int) -> bool:
    """Whether torch computes so much in a time that one can wait for."""
    return not flops or flops / torch_flops(kind, num_threads) < _LONGEST_CALL_SECONDS


def tensors(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The same arguments for torch: its tensors in place of arrays."""
    return tuple(rebuilt(each, _tensor) for each in arguments)


def cache_holding(num_bytes: int, machine: Host, num_threads: int) -> str | None:
    """The innermost cache that holds so many bytes; L1 and L2 are each thread's own."""
    l1d, l2, l3 = ((size or 0) for size in (machine.l1d_bytes, machine.l2_bytes, machine.l3_total_bytes))
    sizes = {"L1": l1d * num_threads, "L2": l2 * num_threads, "L3": l3}
    return next((name for name, size in sizes.items() if num_bytes <= size), None)


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype.names:  # torch has no records
        return array
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
