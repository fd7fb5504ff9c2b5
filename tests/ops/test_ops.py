"""The operators: which backend is chosen, what is refused, what is logged; and the backends against each other."""

import json
import logging
from dataclasses import fields

import numpy as np
import pytest

from pace import isa, kernels
from pace.info import collect
from pace.ops import (
    MLP,
    Frequencies,
    LayerNorm,
    Linear,
    LMHead,
    OperatorConfig,
    RMSNorm,
    RoPE,
    Sampling,
    register_backend,
    registry,
)
from pace.reference.pack_linear import pack_linear
from pace.reference.sample import SAMPLING_DTYPE
from tests.kernels.arrays import BF16, BF16_RTOL, F32, KINDS, assert_close, draw, rng

NAMES = [field.name for field in fields(OperatorConfig)]
needs_native = pytest.mark.skipif(isa.RUNG == "reference", reason="the native kernels: this is the reference rung")


def test_operators_are_those_of_the_registry():
    assert list(registry.OPERATORS) == NAMES


def test_the_default_is_the_first_backend_there_is():
    assert OperatorConfig() == OperatorConfig.all(registry.available()[0])
    assert registry.available()[0] == ("REFERENCE" if isa.RUNG == "reference" else "NATIVE")


@needs_native
@pytest.mark.parametrize(
    "value",
    [
        {"norm": "REFERENCE", "mlp": "NATIVE"},
        '{"norm": "REFERENCE", "mlp": "NATIVE"}',
        ' {"norm": "REFERENCE"}',
        OperatorConfig(norm="REFERENCE"),
    ],
    ids=["mapping", "json", "spaced json", "config"],
)
def test_parse_some(value):
    config = OperatorConfig.parse(value)
    assert config.norm == "REFERENCE"
    assert {getattr(config, name) for name in NAMES if name != "norm"} == {"NATIVE"}


@needs_native
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops.toml", 'norm = "REFERENCE"\nmlp = "NATIVE"\n'),
        ("ops.yaml", "norm: REFERENCE\n"),
        ("ops.json", '{"norm": "REFERENCE"}'),
        ("server.toml", 'port = 8000\n[ops]\nnorm = "REFERENCE"\n'),
        ("server.yml", "port: 8000\nops: {norm: REFERENCE}\n"),
    ],
)
def test_parse_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert OperatorConfig.parse(str(tmp_path / name)) == OperatorConfig(norm="REFERENCE")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("ops.toml", "norm = ", "ops.toml can't be read: "),
        ("ops.yaml", "- NATIVE\n", "ops.yaml holds no options"),
        ("ops.json", '{"nrom": "NATIVE"}', "operator 'nrom' is unknown"),
        (
            "ops.json",
            '{"ops": null}',
            "ops in .*ops.json is None; it must be a backend, or operators with a backend each",
        ),
        ("ops.json", '{"ops": ["NATIVE"]}', "ops in .* is .*; it must be a backend"),
        ("ops.toml", 'ops = "ops.toml"', "ops in .* is 'ops.toml'; it must be a backend"),
        ("gone.json", None, "gone.json can't be read: .*No such file"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, text, match):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        OperatorConfig.parse(str(tmp_path / name))


def test_parse_all_and_none():
    assert OperatorConfig.parse("REFERENCE") == OperatorConfig.all("REFERENCE")
    assert OperatorConfig.parse(None) == OperatorConfig.parse("") == OperatorConfig.parse({}) == OperatorConfig()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"nrom": "NATIVE"}, "operator 'nrom' is unknown; there are norm, linear, qkv_projection, .*lm_head"),
        ({"norm": "FAST"}, "backend 'FAST' is unknown; there are NATIVE, REFERENCE, IMBPS, JIT"),
        ("FAST", "backend 'FAST' is unknown; there are NATIVE, REFERENCE, IMBPS, JIT"),
        ("native", "backend 'native' is unknown; there are NATIVE, REFERENCE, IMBPS, JIT"),
        ('{"norm": ', "operators is not JSON"),
        ('{"norm": 3}', "norm is 3; it must be the name of a backend, such as NATIVE"),
        ('{"norm": null}', "norm is None; it must be the name of a backend"),
        ({"norm": {}}, "norm is {}; it must be the name of a backend"),
        ({"norm": ["NATIVE"]}, r"norm is \['NATIVE'\]; it must be the name of a backend"),
        ({3: "NATIVE", "norm": "NATIVE"}, "operator 3 is unknown; there are norm"),
    ],
)
def test_what_is_not_there(value, match):
    with pytest.raises(ValueError, match=match) as caught:
        OperatorConfig.parse(value)
    assert "\n" not in str(caught.value)


class NormsOnly:
    """A backend from outside, for norms in float32 only."""

    calls = 0
    reason: str | None = None

    @classmethod
    def missing(cls):
        return cls.reason

    @classmethod
    def register_all(cls):
        def counted(name):
            def function(*args, **kwargs):
                cls.calls += 1
                return kernels.reference(name)(*args, **kwargs)

            return function

        registry.register("norm", "NORMS", {name: counted(name) for name in registry.OPERATORS["norm"]}, (F32,))


def clear():
    for each in (registry.missing, registry.resolve, registry._module, registry._installed):
        each.cache_clear()


@pytest.fixture
def outside(monkeypatch):
    clear()
    monkeypatch.setattr(registry, "BACKENDS", registry.BACKENDS.copy())
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())
    monkeypatch.setattr(NormsOnly, "calls", 0)
    register_backend("NORMS", NormsOnly)
    yield NormsOnly
    clear()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The same, of a package that was installed."""
    clear()
    (tmp_path / "norms.py").write_text("from tests.ops.test_ops import NormsOnly\n")
    (tmp_path / "norms-1.dist-info").mkdir()
    (tmp_path / "norms-1.dist-info" / "METADATA").write_text("Name: norms\nVersion: 1\n")
    (tmp_path / "norms-1.dist-info" / "entry_points.txt").write_text("[pace.backends]\nNORMS = norms:NormsOnly\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())
    yield
    clear()


def test_a_backend_of_an_installed_package(installed):
    assert registry.backends()[-1] == "NORMS"
    assert registry.serving("norm", "NORMS", F32) == "NORMS"
    with pytest.raises(ValueError, match="there is a backend NORMS already"):
        register_backend("NORMS", NormsOnly)


def test_a_backend_falls_back_where_it_does_not_serve_and_says_so_once(outside, caplog):
    fallback = registry.available()[0]
    config = OperatorConfig.all("NORMS")
    with caplog.at_level(logging.WARNING, "pace"):
        RMSNorm(config, F32, np.ones(8, np.float32), 1e-5)(np.ones((2, 8), np.float32))
        assert caplog.messages == []
        assert outside.calls == 1
        for _ in range(2):
            RMSNorm(config, BF16, np.ones(8, np.float32), 1e-5)(np.ones((2, 8), BF16))
            RoPE(config, F32, Frequencies(np.ones(2, np.float32)), 4)
    assert outside.calls == 1
    assert caplog.messages == [
        f"NORMS does not serve norm in bfloat16: using {fallback}",
        f"NORMS does not serve rope in float32: using {fallback}",
    ]


def test_a_backend_that_cannot_run_here(outside, monkeypatch):
    monkeypatch.setattr(outside, "reason", "libnorms is not installed")
    there = ", ".join(registry.available())
    assert "NORMS" not in there
    with pytest.raises(
        ValueError, match=f"mlp asks for backend NORMS, but libnorms is not .*; available here: {there}"
    ):
        OperatorConfig(mlp="NORMS")


class Broken:
    """A backend that fails: as it is asked, or as it registers."""

    def __init__(self, where):
        self.where = where

    def missing(self):
        if self.where == "missing":
            raise OSError("libgone.so.1: cannot open shared object file")

    def register_all(self):
        registry.register("norm", "BROKEN", {}, (F32,))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Broken("missing"), "it fails (OSError: libgone.so.1: cannot open shared object file)"),
        (Broken("register_all"), "it fails (ValueError: BROKEN registers norm without"),
        ("no.such.module", "it fails (ModuleNotFoundError: No module named 'no')"),
    ],
)
def test_a_backend_that_fails_leaves_the_others_alone(outside, module, reason):
    register_backend("BROKEN", module)
    assert registry.missing("BROKEN").startswith(reason)
    assert "BROKEN" not in registry.available()
    with pytest.raises(ValueError, match=r"norm asks for backend BROKEN, but it fails .* available here: .*REFERENCE"):
        OperatorConfig(norm="BROKEN")
    OperatorConfig.all("REFERENCE")
    assert collect(operators=True).missing_backends["BROKEN"].startswith(reason)


def test_plain_info_asks_no_backend(outside):
    register_backend("BROKEN", Broken("missing"))
    assert collect().missing_backends == collect().libraries == {}


def test_a_dtype_that_nobody_serves():
    with pytest.raises(TypeError, match="no backend serves norm in float16"):
        OperatorConfig().resolve("norm", np.dtype(np.float16))


def test_registering_too_few_functions():
    with pytest.raises(ValueError, match="HALF registers norm without add_layer_norm, add_rms_norm, layer_norm"):
        registry.register("norm", "HALF", {"rms_norm": print}, (F32,))


# --- each operator on both backends ---

HIDDEN, INNER, ROWS = 45, 77, 7
# A sum of 77 products in another order; bfloat16: two roundings on the way, and terms that cancel.
CLOSE = {F32: {"rtol": 1e-5, "atol": 1e-4}, BF16: {"rtol": 2 * BF16_RTOL, "atol": 0.1}}


def pack(kind, rows, columns, gated=False):
    weight = pack_linear(draw(rng(rows, columns), (rows * (1 + gated), columns), kind, scale=0.2))
    if not gated:
        return weight
    from pace.reference.pack_linear import PackedLinear

    packed = PackedLinear.empty(rows, columns, kind, gated=True)
    for first in range(2):
        pack_linear(draw(rng(rows, first), (rows, columns), kind, scale=0.2), packed, first, 2)
    return packed


def vector(size):
    return draw(rng(size), size)


def rows(kind, columns=HIDDEN):
    return draw(rng(columns, 1), (ROWS, columns), kind)


def norm(make):
    def call(config, kind):
        x, residual = rows(kind), rows(kind) + rows(kind)
        operator = make(config, kind)
        return operator(x), operator(x, residual), residual

    return call


def rope(config, kind):
    q, k = (draw(rng(n), (ROWS, n, 12), kind) for n in (4, 2))
    frequencies = np.linspace(0.1, 1, 6, dtype=np.float32)
    RoPE(config, kind, Frequencies(frequencies), 20)(q, k, np.arange(3, 3 + ROWS, dtype=np.int32))
    return q, k


def test_rope_tables_grow(monkeypatch):
    """Any order of positions, at any size of the tables so far, gives the same bits; none beyond max_positions."""
    frequencies = Frequencies(np.linspace(0.1, 1, 6, dtype=np.float32))
    q, k = (draw(rng(n), (ROWS, n, 12), F32) for n in (4, 2))

    def rotated(operator, first):
        a, b = q.copy(), k.copy()
        operator(a, b, np.arange(first, first + ROWS, dtype=np.int32))
        return a, b

    whole = RoPE(OperatorConfig(), F32, frequencies, 3000)
    monkeypatch.setattr(RoPE, "FIRST_POSITIONS", 16)
    growing = RoPE(OperatorConfig(), F32, frequencies, 3000)
    for first in (0, 9, 10, 200, 3, 3000 - ROWS):
        assert all(map(np.array_equal, rotated(growing, first), rotated(whole, first)))
    for operator in (whole, growing):
        with pytest.raises(ValueError, match=r"positions\[\d\] is 3000; the tables have 3000 positions"):
            rotated(operator, 3000 - ROWS + 1)


def test_rope_tables_take_no_memory_for_positions_that_do_not_come():
    RoPE(OperatorConfig(), F32, Frequencies(np.ones(64, np.float32)), 10**13)


def linear(config, kind):
    weight = config.resolve("qkv_projection", kind).prepare(pack(kind, INNER, HIDDEN))
    operator = Linear("qkv_projection", config, kind, weight, vector(INNER))
    return operator(rows(kind)), operator(rows(kind), "silu", rows(kind, INNER))


def mlp(config, kind):
    """Gated, and not."""
    results = []
    for gated in (True, False):
        weights = pack(kind, INNER, HIDDEN, gated), pack(kind, HIDDEN, INNER)
        prepared = config.resolve("mlp", kind).prepare(*weights)
        operator = MLP(config, kind, prepared, "silu", vector(INNER * (1 + gated)), vector(HIDDEN))
        results += [operator(rows(kind)), operator(rows(kind), rows(kind))]
    return results


def lm_head(config, kind):
    head = config.resolve("lm_head", kind).prepare(pack(kind, INNER + 3, HIDDEN))
    head = LMHead(config, kind, pack(kind, INNER, HIDDEN), head)
    embedded = head.embed(np.array([0, 76, 15, 16], np.int32))
    logits = head.logits(rows(kind))
    assert logits.dtype == np.float32
    return embedded, logits


def scaled_lm_head(config, kind):
    table = pack(kind, INNER, HIDDEN)
    head = LMHead(config, kind, table, table, scale=5.123, softcap=2.5)
    embedded, logits = head.embed(np.array([0, 76], np.int32)), head.logits(rows(kind))
    plain = LMHead(config, kind, table, table)
    # The scale in the model's dtype, as those who trained the model had it.
    scale = np.float32(kind.type(5.123))
    assert np.array_equal(embedded, (plain.embed(np.array([0, 76], np.int32)).astype(np.float32) * scale).astype(kind))
    assert_close(logits, np.float32(2.5) * np.tanh(plain.logits(rows(kind)) / np.float32(2.5)), rtol=1e-6)
    return embedded, logits


def sampling(config, kind):
    params = np.zeros(ROWS, SAMPLING_DTYPE)
    for name in ("temperature", "top_p", "typical_p", "repetition_penalty"):
        params[name] = 1
    drawn = Sampling(config)(rows(F32), params, np.linspace(0.05, 0.95, ROWS), None, None, 3)
    return drawn.tokens, drawn.logprobs, drawn.top_tokens


OPERATORS = {
    "rms_norm": norm(lambda config, kind: RMSNorm(config, kind, vector(HIDDEN), 1e-5)),
    "layer_norm": norm(lambda config, kind: LayerNorm(config, kind, vector(HIDDEN), vector(HIDDEN), 1e-5)),
    "layer_norm without bias": norm(lambda config, kind: LayerNorm(config, kind, vector(HIDDEN), None, 1e-5)),
    "rope": rope,
    "linear": linear,
    "mlp": mlp,
    "lm_head": lm_head,
    "lm_head with scale and softcap": scaled_lm_head,
    "sampling": sampling,
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", [name for name in registry.available() if name != "REFERENCE"])
def test_backends_agree(rung, backend, operator, kind, monkeypatch):
    monkeypatch.setenv("PACE_IMBPS_PIECE", "32")
    mine, reference = (OPERATORS[operator](OperatorConfig.all(name), kind) for name in (backend, "REFERENCE"))
    for ours, expected in zip(mine, reference, strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(ours.astype(np.float32), expected.astype(np.float32), **CLOSE[kind])


def test_json_of_a_command_line():
    chosen = dict.fromkeys(NAMES, "REFERENCE")
    assert OperatorConfig.parse(json.dumps(chosen)) == OperatorConfig.all("REFERENCE")
