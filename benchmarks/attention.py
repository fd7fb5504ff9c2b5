"""How near the machine's limits attention runs, through each cache: `python -m benchmarks.attention [--quick]`.

Measured: decode of one token and of several, causal prefill, the upkeep of the caches, and layouts of blocks; beside
torch's scaled_dot_product_attention, and beside the limits of the machine right before and after each call. Keys and
values of a decode come from memory: a pass goes through layers that hold far more than the caches of the CPU together.
`--json FILE` writes the figures, `--plots DIRECTORY` draws them; `--parts decode,prefill` measures some.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from pace import isa, kernels
from pace.cache import CACHES, CacheShape, KVCache, Placement
from pace.cache.blocks import BlockCache
from pace.cache.memory import Memory
from pace.host import describe
from pace.ops import OperatorConfig
from pace.reference.store_kv import GROUP, kv_shapes

from .case import BF16, F32, draw, has_torch, tensors, torch_form
from .limits import Limits, Samples, Work, beside
from .table import DTYPES, duration

KV_HEADS, HEAD_DIM = 8, 128  # of Llama-3.1-8B, whose group is 4
GROUPS = (1, 4, 8)
CONTEXTS = tuple(1024 << i for i in range(7))
QUERIES = (1, 2, 4, 8, 16, 32, 64)
QUERIES_CONTEXT = 16384
PROMPTS = (256, 512, 1024, 2048, 4096, 8192)
BLOCKS = (16, 64, 256)
SEQUENCES, SEQUENCE_TOKENS, DECODING = 256, 4096, 64
PASS_BYTES = 256 << 20  # of a decode: eight times the L3 cache of most

SCALE = HEAD_DIM**-0.5
FILL_TOKENS = 2048  # at once
# bfloat16: numerators are rounded relative to another maximum, the result once more; see bench_attend.py
CLOSE = {BF16: {"rtol": 2**-6, "atol": 2**-8}, F32: {"rtol": 2e-5, "atol": 1e-5}}
TORCH = "torch"


@dataclass(frozen=True)
class Figure:
    """One measured number, with what it is of. Seconds are a median; shares are medians of ratios taken in place."""

    part: str
    what: str  # a cache, torch, a layout, or a step of the upkeep
    size: int  # keys of a decode, queries, tokens of a prompt, or of a block
    seconds: float
    group: int = 1
    dtype: str = str(BF16)
    rates: dict[str, float] = field(default_factory=dict)  # by limit: bytes or operations a second
    shares: dict[str, float] = field(default_factory=dict)  # of it
    relative: float | None = None  # the time to that of what the part compares with
    least_relative: float | None = None  # the same, if both took what the machine takes at least


def figure(part: str, what: str, size: int, samples: Samples, **named: Any) -> Figure:
    limits = samples.work.amounts
    return Figure(
        part,
        what,
        size,
        median(samples.seconds),
        rates={limit: samples.rate(limit) for limit in limits},
        shares={limit: samples.share(limit) for limit in limits},
        **named,
    )


# --- caches, and what stands in them ---


class Tokens:
    """Keys and values of any token in any layer, out of a few that are drawn."""

    def __init__(self, dtype: np.dtype, count: int = 8192) -> None:
        self.count = count
        self.k, self.v = (np.tile(draw(count, KV_HEADS, HEAD_DIM, kind=dtype, seed=seed), (2, 1, 1)) for seed in (1, 2))

    def of(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        first = (begin + 37 * layer) % self.count
        if end - begin <= self.count:
            return self.k[first : first + end - begin], self.v[first : first + end - begin]
        index = np.arange(first, first + end - begin) % self.count
        return self.k[index], self.v[index]


def make_cache(name: str, num_layers: int, context: int, dtype: np.dtype, backend: str = "NATIVE") -> KVCache:
    """With room for twice the context, and its free blocks in disorder, as they are after a day of use."""
    shape = CacheShape(num_layers, KV_HEADS, HEAD_DIM, dtype, context)
    room = max(context, 1024) * 2 * shape.bytes_per_token
    cache = CACHES[name](shape, room, OperatorConfig.all(backend))
    sequences = [cache.allocate() for _ in range(cache.stats().capacity_tokens // cache.tokens_needed(1))]
    cache.append(sequences, [1] * len(sequences))
    for i in np.random.default_rng(0).permutation(len(sequences)):
        cache.free(sequences[i])
    return cache


def fill(cache: KVCache, num_layers: int, context: int, tokens: Tokens) -> int:
    """A sequence of so many tokens. Each sees only itself, so that filling takes no time to speak of."""
    sequence = cache.allocate()
    for begin in range(0, context, FILL_TOKENS):
        count = min(FILL_TOKENS, context - begin)
        placement = cache.append([sequence], [count])
        for layer in range(num_layers):
            k, v = tokens.of(layer, begin, begin + count)
            cache.attend(layer, k, k, v, placement, SCALE, window=1)
    return sequence


def replaced(cache: KVCache, sequence: int, count: int) -> Placement:
    """The last `count` tokens of a sequence, to be put in once more."""
    length = cache.length(sequence)
    cache.truncate(sequence, length - count)
    return cache.append([sequence], [count])


def attend_layers(
    cache: KVCache, num_layers: int, placement: Placement, q: np.ndarray, tokens: Tokens, **seen: Any
) -> list[np.ndarray]:
    end = int(placement.lengths[0])
    return [
        cache.attend(layer, q, *tokens.of(layer, end - len(q), end), placement, SCALE, **seen)
        for layer in range(num_layers)
    ]


def same(answers: dict[str, list[np.ndarray]]) -> None:
    """Bit for bit."""
    (_, first), *others = answers.items()
    for name, other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert ours.tobytes() == theirs.tobytes(), f"{name} gives other bits"


def check_against_twin(dtype: np.dtype) -> None:
    """A slice of everything that is timed: a prompt, one token, several; over each cache, native and reference."""
    tokens = Tokens(dtype, 512)
    for count, length in ((300, 300), (1, 301), (8, 309)):
        answers = {}
        for name in CACHES:
            for backend in ("NATIVE", "REFERENCE"):
                cache = make_cache(name, 1, 512, dtype, backend)
                sequence = fill(cache, 1, length, tokens)
                placement = replaced(cache, sequence, count)
                q = draw(count, 4 * KV_HEADS, HEAD_DIM, kind=dtype, seed=3)
                answers[name, backend] = attend_layers(cache, 1, placement, q, tokens)
        for backend in ("NATIVE", "REFERENCE"):
            same({name: answers[name, backend] for name in CACHES})
        native, reference = (answers["SLAB_POOL", backend][0] for backend in ("NATIVE", "REFERENCE"))
        np.testing.assert_allclose(native.astype(np.float32), reference.astype(np.float32), **CLOSE[dtype])


# --- torch ---


def sdpa(q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False, gqa: bool = False) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


def torch_works(
    num_layers: int, context: int, q: np.ndarray, tokens: Tokens, amounts: dict[str, float], close_to: np.ndarray
) -> dict[str, Work]:
    """torch over the same keys: it is told the groups, or each head's keys and values are there."""
    if not has_torch(isa.get_num_threads()):
        return {}
    import torch

    count, heads = len(q), q.shape[1]
    group = heads // KV_HEADS
    heads_first = partial(np.swapaxes, axis1=0, axis2=1)
    layers = [
        tensors(tuple(np.ascontiguousarray(heads_first(x))[None] for x in tokens.of(layer, 0, context)))
        for layer in range(num_layers)
    ]
    (queries,) = tensors((np.ascontiguousarray(heads_first(q))[None],))
    mask = None
    if 1 < count < context:
        mask = torch.ones(count, context, dtype=torch.bool).tril(context - count)
    causal = count == context
    works = {}
    for name in ("groups", "repeated") if group > 1 else ("groups",):
        if name == "repeated":
            # As many layers as come from memory, each head with its own.
            fewer = layers[: -(-num_layers // group)]
            layers = [tuple(x.repeat_interleave(group, 1) for x in layer) for layer in fewer]
        form = torch_form(partial(sdpa, mask=mask, causal=causal, gqa=name == "groups" and group > 1))
        answer = np.swapaxes(form(queries, *layers[0])[0].float().numpy(), 0, 1)
        np.testing.assert_allclose(answer, close_to.astype(np.float32), rtol=2**-5, atol=2**-6)
        part = {limit: amount * len(layers) / num_layers for limit, amount in amounts.items()}
        works[f"{TORCH}, {name}"] = Work(partial(_each, form, queries, layers), part, foreign=True)
    return works


def _each(form: Callable[..., Any], queries: Any, layers: Sequence[tuple[Any, ...]]) -> None:
    for layer in layers:
        form(queries, *layer)


def better(samples: dict[str, Samples]) -> dict[str, Samples]:
    """torch once, in the way that took it less time."""
    ways = {name: each for name, each in samples.items() if name.startswith(TORCH)}
    ours = {name: each for name, each in samples.items() if name not in ways}
    return {**ours, TORCH: max(ways.values(), key=_speed)} if ways else ours


def _speed(samples: Samples) -> float:
    return samples.rate(next(iter(samples.work.amounts)))


# --- what is measured ---


@dataclass(frozen=True)
class Run:
    limits: Limits
    quick: bool
    rounds: int


def decode(run: Run) -> Iterator[Figure]:
    """One token after so many, in every layer of a cache."""
    tokens = Tokens(BF16)
    for context in CONTEXTS[::3] if run.quick else CONTEXTS:
        shape = CacheShape(1, KV_HEADS, HEAD_DIM, BF16, context)
        num_layers = -(-PASS_BYTES // (shape.bytes_per_token * context))
        placed = []
        for name in CACHES:
            cache = make_cache(name, num_layers, context, BF16)
            placed.append((name, cache, replaced(cache, fill(cache, num_layers, context, tokens), 1)))
        amounts = {"read": float(shape.bytes_per_token * context * num_layers)}
        for group in GROUPS:
            q = draw(1, group * KV_HEADS, HEAD_DIM, kind=BF16, seed=3)
            calls = {n: partial(attend_layers, cache, num_layers, at, q, tokens) for n, cache, at in placed}
            answers = {name: call() for name, call in calls.items()}
            same(answers)
            works = {name: Work(call, amounts) for name, call in calls.items()}
            works |= torch_works(num_layers, context, q, tokens, amounts, answers["SLAB_POOL"][0])
            for name, samples in better(beside(run.limits, works, run.rounds)).items():
                yield figure("decode", name, context, samples, group=group)


def queries(run: Run) -> Iterator[Figure]:
    """Several tokens at once, and what they cost to one: in the same round, so in the same machine."""
    tokens, context = Tokens(BF16), QUERIES_CONTEXT
    shape = CacheShape(1, KV_HEADS, HEAD_DIM, BF16, context)
    num_layers = -(-PASS_BYTES // (shape.bytes_per_token * context))
    cache = make_cache("SLAB_POOL", num_layers, context, BF16)
    sequence = fill(cache, num_layers, context, tokens)
    counts = [count for count in QUERIES if not run.quick or count in (1, 8, 64)]
    places = {count: replaced(cache, sequence, count) for count in counts}
    for group in GROUPS:
        works = {}
        for count, placement in places.items():
            heads = group * KV_HEADS
            q = draw(64, heads, HEAD_DIM, kind=BF16, seed=3)[-count:]  # so that the last query is the same
            amounts = {
                "read": float(shape.bytes_per_token * context * num_layers),
                "dot": 4.0 * heads * HEAD_DIM * (count * context - count * (count - 1) // 2) * num_layers,
            }
            call = partial(attend_layers, cache, num_layers, placement, q, tokens)
            same({"one": [x[-1] for x in attend_layers(cache, num_layers, places[1], q[-1:], tokens)],
                  f"of {count}": [x[-1] for x in call()]})  # fmt: skip
            works[f"{count}"] = Work(call, amounts)
            if count in (1, 8):
                there = torch_works(num_layers, context, q, tokens, amounts, call()[0])
                works |= {f"{name}, {count}": work for name, work in there.items()}
        samples = beside(run.limits, works, run.rounds)
        one = samples["1"]
        for count in counts:
            least = samples[f"{count}"].least_seconds("read", "dot") / one.least_seconds("read", "dot")
            relative = samples[f"{count}"].relative(one)
            yield figure("queries", "SLAB_POOL", count, samples[f"{count}"], group=group, relative=relative,
                         least_relative=least)  # fmt: skip
        torches = {n: samples[n] for n in samples if n.startswith(TORCH)}
        for count in (1, 8):
            ways = {name: each for name, each in torches.items() if name.endswith(f" {count}")}
            for name, each in better(ways).items():
                yield figure("queries", name, count, each, group=group)


def prefill(run: Run) -> Iterator[Figure]:
    """A prompt from its first token on, causal: each pair of a query and a key that it sees is counted once."""
    heads = 4 * KV_HEADS
    for dtype in (BF16, F32):
        tokens = Tokens(dtype)
        for prompt in PROMPTS[::2] if run.quick else PROMPTS:
            q = draw(prompt, heads, HEAD_DIM, kind=dtype, seed=3)
            flops = 2.0 * heads * HEAD_DIM * prompt * (prompt + 1)
            amounts = {"fma": flops, "dot": flops} if dtype == BF16 else {"fma": flops}
            calls = {}
            for name in CACHES if dtype == BF16 else ["SLAB_POOL"]:
                cache = make_cache(name, 1, prompt, dtype)
                placement = cache.append([cache.allocate()], [prompt])
                calls[name] = partial(attend_layers, cache, 1, placement, q, tokens)
            answers = {name: call() for name, call in calls.items()}
            same(answers)
            works = {name: Work(call, amounts) for name, call in calls.items()}
            works |= torch_works(1, prompt, q, tokens, amounts, answers["SLAB_POOL"][0])
            rounds = run.rounds if prompt < 4096 else 3
            for name, samples in better(beside(run.limits, works, rounds)).items():
                yield figure("prefill", name, prompt, samples, group=4, dtype=str(dtype))


def upkeep(run: Run) -> Iterator[Figure]:
    """What the caches do between calls of kernels; nothing of it touches keys or values."""
    times = 20 if run.quick else 200
    for name in CACHES:
        shape = CacheShape(16, KV_HEADS, HEAD_DIM, BF16, 2 * SEQUENCE_TOKENS)
        room = 2 * SEQUENCES * SEQUENCE_TOKENS * shape.bytes_per_token
        cache = CACHES[name](shape, room, OperatorConfig.all("NATIVE"))
        assert isinstance(cache, BlockCache)  # two steps of append are timed by themselves
        sequences = [cache.allocate() for _ in range(SEQUENCES)]
        rows, none = np.array(sequences), np.zeros(SEQUENCES, np.int64)
        more = cache._blocks_of(none + SEQUENCE_TOKENS)
        watch = Stopwatches()
        for _ in range(times):
            blocks = watch.time("take the blocks of 256 × 4096 tokens", cache._take, int(more.sum()))
            watch.time("fill the tables of 256 × 4096 tokens", cache._fill_tables, rows, none, more, blocks)
            watch.time("give them back", cache._give, blocks)
            watch.time("take and give back one block", _take_and_give, cache)
        for _ in range(times // 10):
            watch.time("append 4096 tokens to each of 256", cache.append, sequences, [SEQUENCE_TOKENS] * SEQUENCES)
            for sequence in sequences:
                cache.truncate(sequence, 0)
        decoding = sequences[:DECODING]
        cache.append(decoding, [SEQUENCE_TOKENS] * DECODING)
        for _ in range(times):
            watch.time("append a token to each of 64", cache.append, decoding, [1] * DECODING)
        for what, seconds in watch.seconds.items():
            yield Figure("upkeep", f"{name}: {what}", cache.block_tokens, median(seconds))


class Stopwatches:
    """How long each kind of step took, every time."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        self.seconds.setdefault(what, []).append(time.perf_counter() - began)
        return result


def _take_and_give(cache: BlockCache) -> None:
    cache._give(cache._take(1))


# --- layouts ---

AXES = ("block", "layer", "kv", "head", "group")
LAYOUTS = {  # from the outermost axis in; the words of a group are innermost in all
    "block-major": ("block", "layer", "kv", "head", "group"),
    "head-major": ("head", "block", "layer", "kv", "group"),
    "layer-major": ("layer", "kv", "block", "head", "group"),
    "K and V interleaved": ("block", "layer", "head", "group", "kv"),
}
LAYOUT_SEQUENCES = {
    "decode 1 × 16384": (1, 1, 16384),
    "decode 16 × 1024": (16, 1, 1024),
    "prefill 2048": (1, 2048, 2048),
}


def layouts(run: Run) -> Iterator[Figure]:
    """The same keys and values in other orders of the axes, through the kernel alone."""
    tokens = Tokens(BF16)
    for case, (sequences, count, context) in LAYOUT_SEQUENCES.items():
        num_layers = 1 if count > 1 else 4096 * 16 // (sequences * context)
        starts = (np.arange(sequences + 1) * count).astype(np.int32)
        lengths = np.full(sequences, context, np.int32)
        q = draw(sequences * count, 4 * KV_HEADS, HEAD_DIM, kind=BF16, seed=3)
        keys = sequences * context * num_layers
        amounts = {"read": 4.0 * KV_HEADS * HEAD_DIM * keys} if count == 1 else {
            "dot": 2.0 * 4 * KV_HEADS * HEAD_DIM * count * (count + 1)
        }  # fmt: skip
        for block_tokens in BLOCKS:
            per_sequence = context // block_tokens
            num_blocks = sequences * per_sequence
            order = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
            table = order.reshape(sequences, per_sequence)
            works, answers, kept = {}, {}, []
            for layout, axes in LAYOUTS.items():
                views, memory = laid_out(axes, num_blocks, num_layers, block_tokens)
                kept.append(memory)
                slots = (order[:, None].astype(np.int64) * block_tokens + np.arange(block_tokens)).ravel()
                for layer, (k_blocks, v_blocks) in enumerate(views):
                    for begin in range(0, len(slots), FILL_TOKENS):
                        some = slots[begin : begin + FILL_TOKENS]
                        kernels.store_kv(*tokens.of(layer, begin, begin + len(some)), k_blocks, v_blocks, some)
                call = partial(_attend_views, views, q, table, starts, lengths)
                answers[layout] = call()
                works[layout] = Work(call, amounts)
            same(answers)
            samples = beside(run.limits, works, run.rounds)
            for layout, each in samples.items():
                relative = each.relative(samples["block-major"])
                yield figure("layouts", f"{case}: {layout}", block_tokens, each, group=4, relative=relative)


def laid_out(
    axes: Sequence[str], num_blocks: int, num_layers: int, block_tokens: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], Memory]:
    """k_blocks and v_blocks of every layer, as views of one memory whose axes stand in this order."""
    sizes = dict(zip(AXES, (num_blocks, num_layers, 2, KV_HEADS, block_tokens // GROUP), strict=True))
    words = GROUP * HEAD_DIM
    memory = Memory(int(np.prod(list(sizes.values()))) * words * BF16.itemsize, huge_pages=True)
    lying = memory.bytes.view(BF16).reshape(*(sizes[axis] for axis in axes), words)
    blocks = lying.transpose(*(axes.index(axis) for axis in AXES), len(AXES))
    k_shape, v_shape = kv_shapes(num_blocks, KV_HEADS, block_tokens, HEAD_DIM, BF16)
    return [(inner(blocks[:, i, 0], k_shape), inner(blocks[:, i, 1], v_shape)) for i in range(num_layers)], memory


def inner(view: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The words of a group in their own axes, without a copy."""
    result = view.reshape(shape)
    assert np.shares_memory(result, view)
    return result


def _attend_views(views: Any, q: np.ndarray, table: Any, starts: Any, lengths: Any) -> list[np.ndarray]:
    return [kernels.attend(q, k_blocks, v_blocks, table, starts, lengths, SCALE) for k_blocks, v_blocks in views]


# --- what is shown ---

PARTS = {"decode": decode, "queries": queries, "prefill": prefill, "upkeep": upkeep, "layouts": layouts}
UNITS = {"read": "GB/s", "fma": "GFLOP/s", "dot": "GFLOP/s"}
SIZES = {"decode": "keys", "queries": "queries", "prefill": "prompt", "upkeep": "block", "layouts": "block"}


def render(part: str, figures: Sequence[Figure]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column(part, style="bold cyan", no_wrap=True)
    timed = [name for name, there in (("rate", "rates"), ("of the limit", "shares")) if getattr(figures[0], there)]
    compared = [name for name in ("relative", "least_relative") if any(getattr(each, name) for each in figures)]
    for name in ("dtype", "group", SIZES[part], "time", *timed, *(name.replace("_", " ") for name in compared)):
        table.add_column(name, justify="right", no_wrap=True)
    for each in figures:
        cells = [each.what, DTYPES[each.dtype], str(each.group), str(each.size), duration(each.seconds)]
        if timed:
            limit = next(iter(each.rates))
            cells.append(f"{each.rates[limit] / 1e9:.1f} {UNITS[limit]}")
            cells.append(", ".join(f"{share:.0%} {limit}" for limit, share in each.shares.items()))
        ratios = [getattr(each, name) for name in compared]
        table.add_row(*cells, *("" if ratio is None else f"×{ratio:.2f}" for ratio in ratios))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, of %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="draw them, with matplotlib")
    arguments = parser.parse_args()
    console = Console(width=128, highlight=False)
    run = Run(Limits(), arguments.quick, rounds=3 if arguments.quick else 7)
    for dtype in (BF16, F32):
        check_against_twin(dtype)
    figures: list[Figure] = []
    for part in arguments.parts.split(","):
        measured = list(PARTS[part](run))
        console.print(render(part, measured))
        figures += measured
    machine = describe()
    about = {
        "cpu": machine.cpu,
        "generation": str(machine.generation),
        "threads": isa.get_num_threads(),
        "rung": isa.RUNG,
    }
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": about, "figures": [asdict(each) for each in figures]}, indent=1)
        )
    if arguments.plots:
        from .plots import draw_plots

        draw_plots(figures, arguments.plots)


if __name__ == "__main__":
    main()
