"""Every backend that this host has, against the twins: drawn shapes, whole models, threads, and what is kept."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace import LLM, kernels
from pace.ops import MLP, Activation, Linear, OperatorConfig, Softmax, registry
from pace.ops.backends import aocl_dlp, jit
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
)
def test_linear(backend, operator, rows, inside, outside, kind, activation, bias, multiply, residual):
    def run(config):
        functions = config.resolve(operator, kind)
        weight = packed(outside, inside, kind)
        if "prepare" in registry.OPERATORS[operator]:
            weight = functions.prepare(weight)
        out = np.full((rows, outside), np.nan, kind)
        result = functions.linear(
            draw(rng(rows), (rows, inside), kind),
            weight,
            draw(rng(1), outside) if bias else None,
            activation,
            draw(rng(2), (rows, outside), kind) if multiply else None,
            draw(rng(3), (rows, outside), kind) if residual else None,
            out=out,
        )
        assert result is out
        return out

    near(run(OperatorConfig.all(backend)), run(OperatorConfig.all("REFERENCE")), kind)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    hidden=st.integers(1, 80),
    inner=st.integers(1, 150),
    kind=st.sampled_from(KINDS),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
)
def test_mlp(backend, rows, hidden, inner, kind, activation, gated, bias, residual):
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
        return operator(draw(rng(rows), (rows, hidden), kind), draw(rng(3), (rows, hidden), kind) if residual else None)

    near(run(OperatorConfig.all(backend)), run(OperatorConfig.all("REFERENCE")), kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", registry.OPERATORS["norm"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_norms(backend, function, kind):
    def run(config):
        call = getattr(config.resolve("norm", kind), function)
        x, residual = draw(rng(1), (7, 45), kind), draw(rng(2), (7, 45), kind)
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
def test_activations(backend, activation, multiply, kind):
    x, factors = draw(rng(1), (7, 45), kind, 3.0), draw(rng(2), (7, 45), kind)
    ours, twin = (
        Activation(OperatorConfig.all(name), kind, activation)(x, factors if multiply else None)
        for name in (backend, "REFERENCE")
    )
    near(ours, twin, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_softmax(backend, kind):
    x = draw(rng(1), (7, 45), kind, 10.0)
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
    return [each for each in gc.get_objects() if isinstance(each, PackedLinear | jit.Weight | aocl_dlp.Weight)]


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
def test_eight_threads_at_once(backend):
    config = OperatorConfig.all(backend)
    operator = Linear(
        "qkv_projection",
        config,
        F32,
        config.resolve("qkv_projection", F32).prepare(packed(48, 64, F32)),
        draw(rng(1), 48),
    )
    inputs = [draw(rng(n), (1 + n % 5, 64), F32) for n in range(64)]
    alone = [operator(x) for x in inputs]
    with ThreadPoolExecutor(8) as threads:
        for ours, expected in zip(threads.map(operator, inputs), alone, strict=True):
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
