"""Every backend that this host has, against the twins: drawn shapes, whole models, threads, and what is kept."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace import LLM, kernels
from pace.ops import MLP, Activation, Linear, OperatorConfig, Softmax, registry
from pace.ops.backends.unpacked import Weight
from pace.reference.activate import ACTIVATIONS
from pace.reference.pack_linear import PackedLinear
from tests.engine.fakes import greedy, write_model
from tests.kernels.arrays import BF16, F32, KINDS, draw, rng
from tests.models import parity
from tests.models.test_gemma3 import GEMMA
from tests.models.test_gpt_oss import GPT_OSS
from tests.models.test_llama import LLAMA

REASONS = {name: registry.missing(name) for name in registry.backends()}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"the backend {name}: {reason}"))
    for name, reason in REASONS.items()
]
# float32: sums in another order. bfloat16: JIT rounds once or twice more than the twin, each half of 2^-8 of a term.
CLOSE = {F32: {"rtol": 1e-4, "atol": 1e-4}, BF16: {"rtol": 3 * 2.0**-8, "atol": 0.15}}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setenv("PACE_IMBPS_PIECE", "32")


def packed(rows, columns, kind, gated=False):
    weight = PackedLinear.empty(rows, columns, kind, gated)
    for half in range(1 + gated):
        kernels.pack_linear(draw(rng(rows, columns, half), (rows, columns), kind, scale=0.2), weight, half, 1 + gated)
    return weight


LAYOUTS = ("whole", "odd", "even", "backwards", "read-only")


def laid_out(array, layout):
    """The same numbers, elsewhere: rows further apart, by an odd number of elements or an even one, or in turn."""
    rows, columns = array.shape
    if layout in ("odd", "even"):
        step = columns + 1 + (columns % 2 == (layout == "odd"))
        array, given = np.full((rows, step), np.nan, array.dtype)[:, :columns], array
        array[...] = given
    elif layout == "backwards":
        array = array[::-1].copy()[::-1]
    elif layout == "read-only":
        array.flags.writeable = False
    return array


def near(ours, twin, kind):
    assert ours.dtype == twin.dtype
    np.testing.assert_allclose(ours.astype(np.float32), twin.astype(np.float32), **CLOSE[kind])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", [name for name, functions in registry.OPERATORS.items() if "linear" in functions])
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(0, 40) | st.integers(120, 130),  # as many as one of our blocks, and more
    inside=st.integers(1, 90),
    outside=st.integers(1, 90),
    kind=st.sampled_from(KINDS),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    bias=st.booleans(),
    multiply=st.booleans(),
    residual=st.booleans(),
    out_kind=st.sampled_from(KINDS),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    out_layout=st.sampled_from(LAYOUTS[:4]),
)
def test_linear(
    backend, operator, rows, inside, outside, kind, activation, bias, multiply, residual, out_kind, layouts, out_layout
):
    def run(config):
        functions = config.resolve(operator, kind)
        weight = packed(outside, inside, kind)
        if "prepare" in registry.OPERATORS[operator]:
            weight = functions.prepare(weight)
        out = laid_out(np.full((rows, outside), np.nan, out_kind), out_layout)
        factors, residuals = (draw(rng(seed), (rows, outside), out_kind) for seed in (2, 3))
        result = functions.linear(
            laid_out(draw(rng(rows), (rows, inside), kind), layouts[0]),
            weight,
            draw(rng(1), outside) if bias else None,
            activation,
            laid_out(factors, layouts[1]) if multiply else None,
            laid_out(residuals, layouts[2]) if residual else None,
            out_kind,
            out,
        )
        assert result is out
        return out

    rounded = BF16 if BF16 in (kind, out_kind) else F32
    near(run(OperatorConfig.all(backend)), run(OperatorConfig.all("REFERENCE")), rounded)


def refused(backend, operator, function, *arguments, **named):
    """What a backend says of arguments that can't be; the weight stands second, where there is one."""
    functions = OperatorConfig.all(backend).resolve(operator, F32)
    arguments = [functions.prepare(each) if isinstance(each, PackedLinear) else each for each in arguments]
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(functions, function)(*arguments, **named)
    return type(raised.value), str(raised.value)


X, ROWS, BIAS, NORM = draw(rng(1), (6, 45)), draw(rng(2), (6, 19)), draw(rng(3), 19), draw(rng(4), 45)
READ_ONLY = np.zeros((6, 19), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"x": X[:, :-1]},
        {"x": X[0]},
        {"x": X.astype(np.float64)},
        {"x": X.astype(BF16)},
        {"x": X[:, ::2]},
        {"bias": BIAS[:-1]},
        {"bias": BIAS.astype(np.float64)},
        {"bias": np.repeat(BIAS, 2)[::2]},
        {"activation": "tanh"},
        {"multiply": ROWS[:1]},
        {"multiply": ROWS.astype(BF16)},
        {"residual": ROWS[:1]},
        {"residual": ROWS[:, :-1]},
        {"residual": ROWS[:, :1].repeat(2, 1)[:, ::2]},
        {"out_dtype": np.float64},
        {"out": ROWS[:1]},
        {"out": ROWS.astype(BF16)},
        {"out": READ_ONLY},
        {"out_dtype": BF16, "residual": ROWS},
    ],
    ids=lambda wrong: "-".join(f"{name}:{getattr(value, 'shape', value)}" for name, value in wrong.items()),
)
def test_what_linear_refuses(backend, wrong):
    given = {"x": X, "weight": packed(19, 45, F32)} | wrong
    x, weight = given.pop("x"), given.pop("weight")
    said = [refused(each, "qkv_projection", "linear", x, weight, **given) for each in (backend, "REFERENCE")]
    assert said[0] == said[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("operator", "function", "arguments"),
    [
        ("norm", "rms_norm", (X, NORM[:-1])),
        ("norm", "rms_norm", (X.astype(np.float64), NORM)),
        ("norm", "rms_norm", (X, NORM, 1e-5, X[:1].copy())),
        ("norm", "add_rms_norm", (X[:1], X.copy(), NORM)),
        ("norm", "layer_norm", (X, NORM, NORM[:-1])),
        ("norm", "add_layer_norm", (X, X[:1].copy(), NORM, None)),
        ("activation", "activate", (X, "tanh")),
        ("activation", "activate", (X, "relu", X[:1])),
        ("activation", "activate", (X, "relu", None, X[:1].copy())),
        ("softmax", "softmax", (X[0],)),
        ("softmax", "softmax", (X, 1.0, X.astype(BF16))),
    ],
)
def test_what_others_refuse(backend, operator, function, arguments):
    said = [refused(each, operator, function, *arguments) for each in (backend, "REFERENCE")]
    assert said[0] == said[1]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    hidden=st.integers(1, 80),
    inner=st.integers(1, 150),
    kind=st.sampled_from(KINDS),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_mlp(backend, rows, hidden, inner, kind, activation, gated, bias, residual, layout):
    def run(config):
        weights = packed(inner, hidden, kind, gated), packed(hidden, inner, kind)
        operator = MLP(
            config,
            kind,
            config.resolve("mlp", kind).prepare(*weights),
            activation,
            draw(rng(1), inner * (1 + gated)) if bias else None,
            draw(rng(2), hidden) if bias else None,
        )
        x, residuals = (laid_out(draw(rng(seed), (rows, hidden), kind), layout) for seed in (4, 3))
        return operator(x, residuals if residual else None)

    near(run(OperatorConfig.all(backend)), run(OperatorConfig.all("REFERENCE")), kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", registry.OPERATORS["norm"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("rows", [0, 7])
def test_norms(backend, function, kind, layout, rows):
    def run(config):
        call = getattr(config.resolve("norm", kind), function)
        x, residual = (laid_out(draw(rng(seed), (rows, 45), kind), layout) for seed in (1, 2))
        more = [draw(rng(3), 45)] + ([draw(rng(4), 45)] if "layer" in function else [])
        out = np.full(x.shape, np.nan, kind)
        given = [x, residual] if function.startswith("add") else [x]
        assert call(*given, *more, 1e-5, out) is out
        return out, residual

    for ours, twin in zip(run(OperatorConfig.all(backend)), run(OperatorConfig.all("REFERENCE")), strict=True):
        near(ours, twin, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "layout"), [(0, "whole"), (7, "whole"), (7, "odd"), (7, "read-only")])
def test_activations(backend, activation, multiply, kind, rows, layout):
    x, factors = laid_out(draw(rng(1), (rows, 45), kind, 3.0), layout), draw(rng(2), (rows, 45), kind)
    ours, twin = (
        Activation(OperatorConfig.all(name), kind, activation)(x, factors if multiply else None)
        for name in (backend, "REFERENCE")
    )
    near(ours, twin, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "layout"), [(0, "whole"), (7, "whole"), (7, "odd"), (7, "read-only")])
def test_softmax(backend, kind, rows, layout):
    x = laid_out(draw(rng(1), (rows, 45), kind, 10.0), layout)
    ours, twin = (Softmax(OperatorConfig.all(name), kind)(x, 0.3) for name in (backend, "REFERENCE"))
    near(ours, twin, kind)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


PROMPTS = [[5, 70, 90, 44, 8] * 9, [100, 101], [7] * 33]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model(backend, tiny):
    """The same text from each in float32; in bfloat16, text at all."""
    texts = {}
    for name in (backend, "REFERENCE"):
        llm = LLM(tiny, dtype="float32", kv_cache_bytes=4 << 20, operators=name)
        texts[name] = [result.outputs[0].token_ids for result in llm.generate(PROMPTS, greedy(max_tokens=12))]
    assert texts[backend] == texts["REFERENCE"]
    rounded = LLM(tiny, dtype="bfloat16", kv_cache_bytes=4 << 20, operators=backend)
    assert all(result.outputs[0].token_ids for result in rounded.generate(PROMPTS, greedy(max_tokens=4)))


FAMILIES = {"windows": (GEMMA, {}), "experts_sinks": (GPT_OSS, {}), "biases": (LLAMA, {"attention_bias": True})}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_families(backend, family, tmp_path):
    """With windows, sinks, head norms and experts, a prompt in pieces; those of the twins, in float32."""
    kind, changes = FAMILIES[family]
    parity.save(tmp_path, kind.make(changes))
    tokens, logits = parity.drawn(90), []
    for name in (backend, "REFERENCE"):
        model = parity.load(tmp_path, "float32", OperatorConfig.all(name))
        logits.append(model.logits(parity.run(model, tokens, [5, 70])))
    parity.assert_near(*logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_kept_once(backend, tiny):
    """All that is packed or prepared, and alive, is what the model says it has."""
    gc.collect()
    before = {id(each) for each in kept()}
    llm = LLM(tiny, dtype="bfloat16", kv_cache_bytes=4 << 20, operators=backend)
    gc.collect()
    mine = [each for each in kept() if id(each) not in before]
    total = sum({address(each): each.nbytes for each in mine}.values())
    assert llm.model.weight_bytes * 0.95 < total < llm.model.weight_bytes * 1.15  # of toys, panels are not full


def kept():
    return [each for each in gc.get_objects() if isinstance(each, PackedLinear | Weight)]


def address(weight):
    return weight.panels.ctypes.data if isinstance(weight, PackedLinear) else id(weight)


def test_two_models_with_two_configurations(tiny):
    one = LLM(tiny, dtype="float32", kv_cache_bytes=4 << 20, operators="REFERENCE")
    other = LLM(
        tiny, dtype="float32", kv_cache_bytes=4 << 20, operators={"mlp": "IMBPS"} if REASONS["IMBPS"] is None else None
    )
    texts = [
        [result.outputs[0].token_ids for result in llm.generate(PROMPTS, greedy(max_tokens=8))]
        for llm in (one, other, one)
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["linear", "mlp", "norm", "softmax", "model"])
def test_eight_threads_at_once(backend, what, tiny):
    config = OperatorConfig.all(backend)
    inputs = [draw(rng(n), (1 + n % 5, 64), F32) for n in range(64)]
    if what == "linear":
        weight = config.resolve("qkv_projection", F32).prepare(packed(48, 64, F32))
        call = Linear("qkv_projection", config, F32, weight, draw(rng(1), 48))
    elif what == "mlp":
        weights = config.resolve("mlp", F32).prepare(packed(80, 64, F32, gated=True), packed(64, 80, F32))
        call = MLP(config, F32, weights, "silu", None, None)
    elif what == "norm":
        call = partial(config.resolve("norm", F32).rms_norm, weight=draw(rng(1), 64))
    elif what == "softmax":
        call = Softmax(config, F32)
    else:  # and attention
        model, inputs = parity.load(tiny, "float32", config), [parity.drawn(5 + n) for n in range(16)]

        def call(tokens):
            return parity.run(model, tokens, [3])

    alone = [call(x) for x in inputs]
    with ThreadPoolExecutor(8) as threads:
        for ours, expected in zip(threads.map(call, inputs), alone, strict=True):
            assert np.array_equal(ours, expected)


FORKED = """
import os, signal, sys
import numpy as np
from pace import kernels
from pace.ops import Linear, OperatorConfig
signal.alarm(60)
weight = kernels.pack_linear(np.ones((512, 512), np.float32))
config = OperatorConfig.all(sys.argv[1])
linear = Linear("qkv_projection", config, weight.dtype, config.resolve("qkv_projection", weight.dtype).prepare(weight))
if os.fork() == 0:
    signal.alarm(60)
    os._exit(0 if (linear(np.ones((64, 512), np.float32)) == 512).all() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_process_with_prepared_weights_can_be_forked(backend):
    """As the server's nodes are; an engine that computes with them does not hang."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", FORKED, backend], env=environment, check=False).returncode == 0
