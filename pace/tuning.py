"""Which backend is the fastest for each operator of a model, here.

A step of the model is run, and the calls that it makes of its operators are noted down. Then each backend makes the
calls of one operator again, all layers' one after the other, so that weights come from where they come from in a step;
backends take turns. Weights are random, of the model's own shapes; of a large model, it is the first layers.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import host, isa, numa
from .cache import CACHES
from .models import Model, choose_dtype, load_model, open_checkpoint
from .models.checkpoint import Checkpoint
from .models.hub import cache_directory, resolve
from .models.random_weights import num_layers, random_checkpoint
from .ops import OperatorConfig, Sampling, registry
from .ops.registry import Dtype
from .reference.sample import SAMPLING_DTYPE

CONTEXT = 128  # tokens before those that are decoded
PROMPT = 512
ANSWER = 128  # tokens that are decoded for a prompt, where one backend is to be chosen for both
WEIGHT_BYTES = 4 << 30  # that are made, at most; and no more than a quarter of the memory that is free
ROUNDS, ROUND_SECONDS = 5, 1.0  # of a backend, of which only some calls are made where all would take longer
# That change what backends do; the files that some of them name count as well.
SETTINGS = "PACE_IMBPS_PIECE", "ONEDNN_MAX_CPU_ISA", "PACE_LIBXSMM", "LIBXSMM_TARGET", "PACE_AOCL_DLP"
PAUSE = 0.05  # seconds before a backend's turn: for a while, threads of OpenMP wait for more to do on all CPUs
FASTER = 0.97  # of NATIVE's time, below which another backend is chosen


@dataclass(frozen=True)
class Timing:
    """What an operator takes in a step of all layers that were measured, with a backend."""

    operator: str
    tokens: int  # new ones in the step
    backend: str
    seconds: float


@dataclass(frozen=True)
class Report:
    model: str
    dtype: str
    layers: int
    context: int  # tokens before one that is decoded
    cpu: str
    rung: str
    threads: int
    libraries: dict[str, str]
    timings: list[Timing]


@dataclass(frozen=True)
class Call:
    function: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class Recorder(OperatorConfig):
    """The default backends; notes the calls of a step."""

    calls: dict[str, list[Call]] | None
    shared: set[str]  # operators whose weights another operator reads as well

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "calls", None)
        object.__setattr__(self, "shared", set())

    def resolve(self, operator: str, dtype: Dtype, in_panels: bool = False) -> SimpleNamespace:
        if in_panels:
            self.shared.add(operator)
        functions = super().resolve(operator, dtype, in_panels)
        return SimpleNamespace(
            **{name: self._noting(operator, name, function) for name, function in vars(functions).items()}
        )

    def _noting(self, operator: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self.calls is not None:
                self.calls.setdefault(operator, []).append(Call(name, arguments, named))
            return function(*arguments, **named)

        return call

    def noted(self, step: Callable[[], None]) -> dict[str, list[Call]]:
        """What a step calls, by operator."""
        object.__setattr__(self, "calls", {})
        step()
        calls = self.calls or {}
        object.__setattr__(self, "calls", None)
        return calls


def measure(
    model: str | Path | None = None,
    dtype: str = "auto",
    tokens: Sequence[int] | None = None,
    backends: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda _: None,
    config: str | Path | None = None,
) -> Report:
    """Time every operator on every backend (or these) that serves it. model: as for LLM, or else the path of a
    config.json; dtype: as load_model's. tokens: of each step that is measured: 1 is decoded after CONTEXT others, more
    are a prompt; by default one of each, shorter for a model whose texts are.

    ModelError for a model that is not there; ValueError for a backend that is not, or more tokens than a text may have.
    """
    chosen = list(backends) if backends is not None else registry.available()
    for backend in chosen:
        if (reason := registry.missing(backend)) is not None:
            raise ValueError(f"{backend} can't run: {reason}; available here: {', '.join(registry.available())}")
    numa.settle()  # as the engine does
    tell("making weights")
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as scratch:
        if config is None:
            with open_checkpoint(resolve(str(model))) as checkpoint:
                dtype, config = str(choose_dtype(dtype, checkpoint)), Path(scratch) / "config.json"
                config.write_text(json.dumps(checkpoint.config))
        with _random(Path(config), dtype) as weights:
            loaded = load_model(weights, dtype, recorder)
    longest = loaded.max_positions
    if tokens is None:
        tokens = 1, min(PROMPT, longest)
    if max(tokens) > longest:
        raise ValueError(f"tokens is {max(tokens)}; a text of this model has at most {longest}")
    context = min(CONTEXT, longest - 1)
    return Report(
        str(model or config),
        str(loaded.dtype),
        loaded.cache_shape.num_layers,
        context,
        host.describe().cpu,
        isa.RUNG,
        isa.get_num_threads(),
        registry.libraries(),
        [each for count in tokens for each in _step(loaded, recorder, count, context, chosen, tell)],
    )


def tuned(model: str | Path, dtype: str = "auto") -> OperatorConfig:
    """As OperatorConfig.tuned."""
    numa.settle()  # before threads are counted
    path = resolve(str(model))
    with open_checkpoint(path) as checkpoint:
        config, dtype = checkpoint.config, str(choose_dtype(dtype, checkpoint))
    known = json.dumps([config, dtype, *_circumstances()], sort_keys=True)
    file = cache_directory() / "tuned" / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.json"
    kept = _kept(file)
    if kept is None:
        kept = choose(measure(path, dtype, backends=[name for name in registry.available() if name != "REFERENCE"]))
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:  # of this process alone
            part.write(json.dumps(asdict(kept), indent=2) + "\n")
        os.replace(part.name, file)
    return kept


def _circumstances() -> list[Any]:
    """What else the answer depends on."""
    settings = {name: os.environ.get(name) for name in SETTINGS}
    files = [Path(value).stat() for value in settings.values() if value is not None and Path(value).is_file()]
    built = [[file.st_size, file.st_mtime_ns] for file in files]
    machine = [host.describe().cpu, isa.RUNG, isa.get_num_threads()]
    return [version("pace"), machine, registry.available(), registry.libraries(), settings, built]


def _kept(file: Path) -> OperatorConfig | None:
    """What was measured before; None where nothing was, or it can't be read."""
    try:
        values = json.loads(file.read_text())
        return OperatorConfig.parse(values) if isinstance(values, dict) and values else None
    except (OSError, ValueError):
        return None


def choose(report: Report) -> OperatorConfig:
    """The fastest of each operator, for a prompt and ANSWER tokens after it; the default where it is nearly as fast."""
    default, chosen = OperatorConfig(), {}
    for operator in {each.operator: None for each in report.timings}:
        costs: dict[str, float] = {}
        for each in report.timings:
            if each.operator == operator:
                times = ANSWER if each.tokens == 1 else 1
                costs[each.backend] = costs.get(each.backend, 0) + times * each.seconds
        own, best = getattr(default, operator), min(costs, key=lambda backend: costs[backend])
        chosen[operator] = best if own not in costs or costs[best] < FASTER * costs[own] else own
    return OperatorConfig(**chosen)


def _random(config: Path, dtype: str) -> Checkpoint:
    """Random weights of a model's shapes: of so many layers as there is memory for."""
    whole = random_checkpoint(config, dtype)
    one = random_checkpoint(config, dtype, layers=1)
    layers = num_layers(whole.config)
    of_a_layer = max((whole.num_bytes - one.num_bytes) / max(layers - 1, 1), 1)
    room = min(WEIGHT_BYTES, (host.describe().memory_available_bytes or 4 * WEIGHT_BYTES) / 4)
    fit = 1 + max(int((room - one.num_bytes) / of_a_layer), 0)
    return whole if fit >= layers else random_checkpoint(config, dtype, layers=fit)


def _step(
    model: Model, recorder: Recorder, count: int, before: int, backends: Sequence[str], tell: Callable[[str], None]
) -> list[Timing]:
    shape, context = model.cache_shape, before if count == 1 else 0
    cache = CACHES["SLAB_POOL"](shape, 2 * (context + count + 512) * shape.bytes_per_token, recorder, None, False)
    rng, sequence, sampling = np.random.default_rng(0), cache.allocate(), Sampling(recorder)
    tokens = rng.integers(0, model.vocabulary, context + count).astype(np.int32)
    if context:
        model.forward(tokens[:context], cache.append([sequence], [context]), cache)

    def step() -> None:
        hidden = model.forward(tokens[context:], cache.append([sequence], [count]), cache)
        sampling(model.logits(hidden[-1:]), _params(), None, None, None, None)

    calls = recorder.noted(step)
    timings = []
    for operator in registry.OPERATORS:
        if operator in calls:
            tell(f"{operator}, {count} {'token' if count == 1 else 'tokens'}")
            served = {
                backend: functions
                for backend in backends
                if (functions := _functions(operator, backend, model.dtype, operator in recorder.shared)) is not None
            }
            seconds = _in_turns({name: _replays(functions, calls[operator]) for name, functions in served.items()})
            timings += [Timing(operator, count, name, each) for name, each in seconds.items()]
    return timings


def _params() -> np.ndarray:
    """Of a text that is drawn greedily."""
    params = np.zeros(1, SAMPLING_DTYPE)
    for name in ("top_p", "typical_p", "repetition_penalty"):
        params[name] = 1
    return params


def _functions(operator: str, backend: str, dtype: Dtype, shared: bool) -> dict[str, Callable[..., Any]] | None:
    """None where it does not serve the operator."""
    found = registry.registration(operator, backend)
    if found is None or dtype not in found.dtypes or (shared and not found.in_panels):
        return None
    return dict(found.functions)


def _replays(functions: dict[str, Callable[..., Any]], calls: Sequence[Call]) -> list[Callable[[], Any]]:
    """The calls once more; the weights of each as `functions` take them."""

    def replay(call: Call) -> Callable[[], Any]:
        function, arguments = functions[call.function], list(call.arguments)
        if call.function in ("linear", "mlp") and "prepare" in functions:
            weights = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
            arguments[1] = functions["prepare"](*weights)
        return lambda: function(*arguments, **call.named)

    return [replay(call) for call in calls]


def _in_turns(replays: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Seconds of all calls, by backend: the median of the rounds."""
    some, seconds = {}, {}
    for name, calls in replays.items():
        calls[0]()  # what is made at first is not counted
        began = time.perf_counter()
        calls[0]()
        first = time.perf_counter() - began
        some[name] = calls[: max(int(ROUND_SECONDS / max(first, 1e-9)), 1)]
        seconds[name] = list[float]()
    for _ in range(ROUNDS):
        for name, calls in some.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            for call in calls:
                call()
            seconds[name].append((time.perf_counter() - began) * len(replays[name]) / len(calls))
    return {name: median(each) for name, each in seconds.items()}


def render(report: Report) -> RenderableType:
    """The report, for a terminal: milliseconds, the fastest of each operator in bold."""
    title = f"[bold cyan]{report.model}[/]  {report.layers} layers · {report.dtype}"
    machine = f"{report.cpu} · {report.rung}, {report.threads} threads"
    libraries = [Text(f"{backend}: {library}", style="dim") for backend, library in report.libraries.items()]
    tables = [_table(report, tokens) for tokens in sorted({each.tokens for each in report.timings})]
    chosen, default = choose(report), OperatorConfig()
    other = {
        name: backend
        for name, backend in asdict(chosen).items()
        if any(each.operator == name for each in report.timings) and backend != getattr(default, name)
    }
    verdict = f"--ops '{json.dumps(other)}'" if other else f"everything on {default.mlp}"
    return Group("", title, Text(machine, style="dim"), *libraries, *tables, "", f"[bold]tuned[/]: {verdict}", "")


def _table(report: Report, tokens: int) -> Table:
    what = f"one token after {report.context}" if tokens == 1 else f"a prompt of {tokens} tokens"
    seconds = {(each.operator, each.backend): each.seconds for each in report.timings if each.tokens == tokens}
    backends = list({backend: None for _, backend in seconds})
    table = Table(
        title=f"{what}: milliseconds of all layers",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("operator", style="cyan", no_wrap=True)
    for backend in backends:
        table.add_column(backend, justify="right")
    for operator in list({name: None for name, _ in seconds}):
        row = [seconds.get((operator, backend)) for backend in backends]
        best = min(each for each in row if each is not None)
        table.add_row(operator, *(_milliseconds(each, each == best) for each in row))
    return table


def _milliseconds(seconds: float | None, best: bool) -> str:
    if seconds is None:
        return "[dim]–[/]"
    text = f"{1e3 * seconds:.{max(2 - len(str(int(1e3 * seconds))), 0) + 1}f}"
    return f"[bold green]{text}[/]" if best else text
