"""How fast a model is here, and how near the machine's limits: the data behind `pace bench model`, and its rendering.

The model alone is measured, with a cache: no sampling, no text, no engine around it.
"""

import re
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Self

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import host, isa, numa, roofline
from .cache import CACHES, KVCache
from .cache.base import Ints
from .engine.config import EngineConfig
from .engine.loader import check_cache
from .errors import ModelError
from .info import describe_roofline
from .models import Checkpoint, Model, load_model
from .models.config import Config
from .models.layers import Decoder
from .models.random_weights import RandomCheckpoint, num_weights
from .ops import OperatorConfig
from .reference.arrays import Array, bfloat16
from .roofline import Roofline
from .sysfs import kib, read_fields

CHUNK = EngineConfig().max_batch_tokens  # of a prompt, as an engine cuts it
ROOM = 2  # times the tokens that are to be stored: caches hold them in blocks
LAYER = re.compile(r"\.(layers|h)\.\d+\.")  # in the names of what every token of a prompt is multiplied with


@dataclass(frozen=True)
class Pass:
    """A forward pass of `tokens` new tokens: a prompt in its chunks, or one token of each of so many sequences."""

    tokens: int
    seconds: float  # the median
    bound: str  # which limit binds: "memory", "bf16" or "fp32"
    share: float  # of its time is what the machine takes at that limit, as measured right before and after; the median

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Memory:
    """Bytes. Peaks are the process's; None where the system does not tell."""

    weights: int  # packed
    cached: int  # keys and values, at most
    before: int | None  # the peak before the model was loaded
    loaded: int | None  # … when it was
    peak: int | None  # … and in the end


@dataclass(frozen=True)
class Report:
    model: str
    num_weights: int
    num_layers: int
    dtype: str
    cache: str
    operators: dict[str, str]
    cpu: str
    load_seconds: float
    memory: Memory
    prefill: list[Pass]
    context: int  # tokens before those that are decoded
    decode: list[Pass]
    limits: Roofline  # the best that were measured
    rounds: int


@dataclass(frozen=True)
class Plan:
    """What to measure. ValueError for what can't be."""

    prompt_tokens: Sequence[int] = (128, 512)
    output_tokens: int = 32
    batches: Sequence[int] = (1, 8)
    seconds: float = 20.0  # rounds are begun for so long; there is one at least
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens", "batches"):
            value = getattr(self, name)
            numbers = value if isinstance(value, Sequence) else [value]
            if not numbers or min(numbers) < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")

    @property
    def context(self) -> int:
        return min(self.prompt_tokens)

    @property
    def cached_tokens(self) -> int:
        """That the cache holds at once, at most."""
        return max(max(self.prompt_tokens) + self.context, max(self.batches) * (self.context + self.output_tokens))


def measure(
    checkpoint: Checkpoint,
    name: str,
    plan: Plan,
    dtype: str = "auto",
    cache: str = "SLAB_POOL",
    operators: OperatorConfig | None = None,
    progress: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Load a model and measure it. dtype, cache and operators: as load_engine's; tell: gets what is being done.

    ModelError where hidden states or logits are not finite; ValueError for what does not fit the model or the memory.
    """
    check_cache(cache, None)
    operators = operators or OperatorConfig()
    if isinstance(checkpoint, RandomCheckpoint):
        _check_memory(checkpoint)
    numa.settle()
    before, began = peak_bytes(), time.perf_counter()
    tell("loading")
    model = load_model(checkpoint, dtype, operators, progress)
    seconds, loaded = time.perf_counter() - began, peak_bytes()
    if max(plan.prompt_tokens) + plan.output_tokens > model.max_positions:
        raise ValueError(
            f"{max(plan.prompt_tokens)} tokens of prompt and {plan.output_tokens} of output do not fit the model's "
            f"context of {model.max_positions}"
        )
    with Machine() as machine:
        rounds = Rounds(model, new_cache(model, cache, plan, operators), plan, machine.limits, tell)
        rounds.run()
    work = Work.of(model, checkpoint)
    return Report(
        model=name,
        num_weights=sum(num_weights(each, checkpoint.shape(each)) for each in checkpoint.names()),
        num_layers=model.cache_shape.num_layers,
        dtype=str(model.dtype),
        cache=cache,
        operators=asdict(operators),
        cpu=host.describe().cpu,
        load_seconds=seconds,
        memory=Memory(model.weight_bytes, rounds.cached, before, loaded, peak_bytes()),
        prefill=[work.prefill(tokens, samples) for tokens, samples in rounds.prefills.items()],
        context=plan.context,
        decode=[work.decode(batch, plan, samples) for batch, samples in rounds.steps.items()],
        limits=rounds.best,
        rounds=rounds.count,
    )


class Machine:
    """Measures the limits in a process of its own, so that the memory that it takes for that is not the model's."""

    def __init__(self) -> None:
        interrupts = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
        self._process = ProcessPoolExecutor(1, get_context("spawn"), *interrupts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def limits(self) -> Roofline:
        return self._process.submit(roofline.measure, isa.get_num_threads()).result()


@dataclass(frozen=True)
class Sample:
    """How long a pass took in one round, the median, and the limits around it."""

    seconds: float
    limits: Roofline


class Rounds:
    """Every pass of a plan, again and again, the limits measured before and after each.

    All sequences of a batch begin as forks of one prompt, and go on with random tokens, each with its own.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        plan: Plan,
        limits: Callable[[], Roofline],
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.cache, self.plan, self.limits, self.tell = model, cache, plan, limits, tell
        self.prefills: dict[int, list[Sample]] = {tokens: [] for tokens in plan.prompt_tokens}
        self.steps: dict[int, list[Sample]] = {batch: [] for batch in plan.batches}
        self.count, self.cached = 0, 0  # rounds; bytes of keys and values, at most
        self._rng = np.random.default_rng(plan.seed)

    def run(self) -> None:
        tell, began = self.tell, time.perf_counter()
        tell("measuring the machine")
        self.best = self._now = self.limits()
        while self.count == 0 or time.perf_counter() - began < self.plan.seconds:
            self._round()
            self.count += 1

    def _round(self) -> None:
        for tokens, samples in self.prefills.items():
            self.tell(f"a prompt of {tokens} tokens")
            sequence, seconds = self._prefill(tokens)
            samples.append(self._sample([seconds]))
            if tokens == self.plan.context:
                prompt = sequence
            else:
                self._free([sequence])
        for batch, samples in self.steps.items():
            self.tell(f"decoding {batch} at a time")
            sequences = [self.cache.fork(prompt) for _ in range(batch)]
            samples.append(self._sample([self._step(sequences) for _ in range(self.plan.output_tokens)]))
            self._free(sequences)
        self._free([prompt])

    def _sample(self, seconds: Sequence[float]) -> Sample:
        before, self._now = self._now, self.limits()
        self.best = roofline.best(self.best, self._now)
        return Sample(median(seconds), mean(before, self._now))

    def _prefill(self, num_tokens: int) -> tuple[int, float]:
        """The new sequence, and the seconds up to the logits of its next token."""
        sequence, tokens = self.cache.allocate(), self._tokens(num_tokens)
        began = time.perf_counter()
        for start in range(0, num_tokens, CHUNK):
            hidden = self._forward([sequence], tokens[start : start + CHUNK])
        logits = self.model.logits(hidden[-1:])
        took = time.perf_counter() - began
        self._check(hidden, logits, f"a prompt of {num_tokens} tokens")
        return sequence, took

    def _step(self, sequences: Sequence[int]) -> float:
        tokens = self._tokens(len(sequences))
        began = time.perf_counter()
        hidden = self._forward(sequences, tokens)
        logits = self.model.logits(hidden)
        took = time.perf_counter() - began
        self._check(hidden, logits, f"a step of {len(sequences)} sequences")
        return took

    def _forward(self, sequences: Sequence[int], tokens: Ints) -> Array:
        """Of as many tokens of each."""
        placement = self.cache.append(sequences, [len(tokens) // len(sequences)] * len(sequences), tokens)
        return self.model.forward(tokens, placement, self.cache)

    def _tokens(self, count: int) -> Ints:
        return self._rng.integers(0, self.model.vocabulary, count, np.int32)

    def _check(self, hidden: Array, logits: Array, of: str) -> None:
        for values, what in ((hidden, "hidden states"), (logits, "logits")):
            if not np.isfinite(values.astype(np.float32)).all():
                raise ModelError(f"the {what} of {of} hold NaN or infinity")

    def _free(self, sequences: Sequence[int]) -> None:
        self.cached = max(self.cached, self.cache.stats().used_bytes)
        for sequence in sequences:
            self.cache.free(sequence)


@dataclass(frozen=True)
class Work:
    """What passes take of the machine; attention's arithmetic, a few percent of a prompt's, is not counted."""

    model: Model
    layers: int  # weights that a token is multiplied with in the layers, and in the head
    head: int

    @classmethod
    def of(cls, model: Model, checkpoint: Checkpoint) -> "Work":
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names() if "vision" not in name}
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        chosen = Config(checkpoint.config).text.values.get("num_experts_per_tok")
        layers = 0
        for name, shape in matrices.items():
            if LAYER.search(name):
                of_all = chosen / shape[0] if chosen and ".experts." in name else 1
                layers += round(of_all * num_weights(name, shape))
        outside = [prod(shape) for name, shape in matrices.items() if not LAYER.search(name)]
        return cls(model, layers, max(outside, default=0))

    def prefill(self, tokens: int, samples: Sequence[Sample]) -> Pass:
        """The head is multiplied for the last token alone."""
        read = -(-tokens // CHUNK) * self.model.bytes_of_step(min(tokens, CHUNK))
        return self._pass(tokens, read, 2 * (tokens * self.layers + self.head), samples)

    def decode(self, batch: int, plan: Plan, samples: Sequence[Sample]) -> Pass:
        """The keys and values of the prompt that all have begun with are counted once."""
        keys = self._keys(plan.context) + batch * self._keys(plan.output_tokens // 2)
        return self._pass(batch, self.model.bytes_of_step(batch) + keys, 2 * batch * (self.layers + self.head), samples)

    def _keys(self, tokens: int) -> int:
        """Bytes of keys and values that one token sees of so many."""
        shape = self.model.cache_shape
        layers = self.model.layers if isinstance(self.model, Decoder) else []
        windows = [layer.attention.window for layer in layers] or [None] * shape.num_layers
        seen = sum(tokens if window is None else min(tokens, window) for window in windows)
        return seen * shape.bytes_per_token // shape.num_layers

    def _pass(self, tokens: int, num_bytes: int, flops: int, samples: Sequence[Sample]) -> Pass:
        bf16 = self.model.dtype == bfloat16
        least = [each.limits.shortest_seconds(num_bytes, flops, bf16=bf16) for each in samples]
        reads = sum(
            seconds == each.limits.shortest_seconds(num_bytes) for seconds, each in zip(least, samples, strict=True)
        )
        return Pass(
            tokens,
            median(each.seconds for each in samples),
            "memory" if 2 * reads > len(samples) else "bf16" if bf16 else "fp32",
            median(seconds / each.seconds for seconds, each in zip(least, samples, strict=True)),
        )


def mean(a: Roofline, b: Roofline) -> Roofline:
    names = ("read_bytes_per_second", "fma_flops", "bf16_flops")
    return replace(a, **{name: (getattr(a, name) + getattr(b, name)) / 2 for name in names})


def peak_bytes() -> int | None:
    """The most memory that this process has had, in pages that were there."""
    return kib(read_fields(Path("/proc/self/status")), "VmHWM")


def new_cache(model: Model, name: str, plan: Plan, operators: OperatorConfig) -> KVCache:
    """With room for the plan; of what is not used nothing is taken."""
    blocks = (max(plan.batches) + 2) * 512  # tokens in blocks that are begun
    tokens = ROOM * plan.cached_tokens + blocks
    return CACHES[name](model.cache_shape, tokens * model.cache_shape.bytes_per_token, operators, None, False)


def _check_memory(checkpoint: RandomCheckpoint) -> None:
    free, needed = host.describe().memory_available_bytes, checkpoint.num_bytes
    if free is not None and needed > free:
        raise ValueError(
            f"the weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: build fewer layers (--layers N)"
        )


def render(report: Report) -> RenderableType:
    """The report, for a terminal."""
    title = (
        f"[bold cyan]{report.model}[/]  {report.num_weights / 1e9:.2f} billion weights, {report.num_layers} layers · "
        f"{report.dtype} · {report.cache}"
    )
    facts = Table(box=None, show_header=False, padding=(0, 2))
    facts.add_column(style="bold cyan", no_wrap=True)
    facts.add_column()
    facts.add_row("load", _load(report))
    facts.add_row("memory", _memory(report.memory))
    facts.add_row("machine", describe_roofline(report.limits))
    speeds = Table(box=box.SIMPLE_HEAD, padding=(0, 2), pad_edge=False)
    speeds.add_column("", style="bold cyan", no_wrap=True)
    for name in ("tokens/s", "ms", "of the limit"):
        speeds.add_column(name, justify="right", no_wrap=True)
    for each in report.prefill:
        speeds.add_row(f"prefill, {each.tokens} tokens", *_cells(each))
    for each in report.decode:
        speeds.add_row(f"decode, {each.tokens} at a time", *_cells(each))
    rounds = f"{report.rounds} round{'s' if report.rounds > 1 else ''}"
    note = (
        f"medians of {rounds}; decoding after {report.context} tokens; without sampling; limits as measured beside each"
    )
    return Group(Text(), Text.from_markup(title), facts, speeds, Text(note, style="dim"))


def _cells(speed: Pass) -> tuple[str, str, str]:
    return f"{speed.rate:.1f}", f"{speed.seconds * 1e3:.1f}", f"{speed.share:.0%} ({speed.bound})"


def _load(report: Report) -> str:
    return f"{report.load_seconds:.2f} s, {report.memory.weights / report.load_seconds / 1e9:.2f} GB/s"


def _memory(memory: Memory) -> str:
    sizes = {"packed": memory.weights, "keys and values": memory.cached}
    peaks = {"peak while loading": memory.loaded, "in the end": memory.peak}
    return " · ".join(f"{what} {size / 1e9:.3f} GB" for what, size in (sizes | peaks).items() if size is not None)
