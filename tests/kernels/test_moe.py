import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kernels import reference
from pace.reference.pack_experts import MXFP4, PackedExperts, unpack_experts

from .arrays import (
    BF16,
    F32,
    KINDS,
    Guarded,
    assert_close,
    assert_same_refusal,
    draw,
    rng,
    spaced_rows,
    swapped,
    threads,
)
from .test_pack_experts import drawn_blocks

moe, pack_experts = reference("moe"), reference("pack_experts")

# As gated_mlp's, where the results have the size 1: h is a product of two sums of K products in another order. In
# bfloat16 h, too, is rounded: where the twins' h round to neighbours, as a few do, the sum has an error of that.
TOLERANCE = {F32: {"rtol": 2e-5, "atol": 2e-5}, BF16: {"rtol": 2**-7, "atol": 2**-7}}


def drawn_experts(generator, num_experts, out_features, in_features, dtype, gated=False):
    """Of a size that leaves numbers of size 1 at size 1, about."""
    packed = PackedExperts.empty(num_experts, out_features, in_features, dtype, gated)
    size = max(in_features, 1) ** -0.5
    for expert in range(num_experts):
        for half in range(1 + gated):
            if dtype == MXFP4:
                near = 127 + round(np.log2(size / 3))
                codes, scales = drawn_blocks(generator, out_features, in_features // 32, (near - 2, near + 2))
                pack_experts(codes, packed, expert, scales, half, 1 + gated)
            else:
                weight = draw(generator, (out_features, in_features), dtype, scale=size)
                pack_experts(weight, packed, expert, None, half, 1 + gated)
    return packed


def case(seed, tokens, hidden, inner, num_experts, k, kind, weights=None):
    generator = rng(seed)
    gate_up = drawn_experts(generator, num_experts, inner, hidden, weights or kind, gated=True)
    down = drawn_experts(generator, num_experts, hidden, inner, weights or kind)
    chosen = np.stack([generator.permutation(num_experts)[:k] for _ in range(tokens)] or [np.empty(k)]).astype(np.int32)
    shares = generator.random((tokens, k), np.float32)
    biases = draw(generator, (num_experts, 2 * inner)), draw(generator, (num_experts, hidden))
    return draw(generator, (tokens, hidden), kind), gate_up, down, chosen[:tokens], shares, *biases


def unpacked(weight, kind):
    """The same experts, of float32 or bfloat16."""
    to = PackedExperts.empty(weight.num_experts, weight.out_features, weight.in_features, kind, weight.gated)
    for expert in range(weight.num_experts):
        halves = unpack_experts(weight, expert)
        for half, rows in enumerate(halves if weight.gated else [halves]):
            pack_experts(rows, to, expert, None, half, 1 + weight.gated)
    return to


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 30),
    hidden=st.integers(1, 100),
    inner=st.integers(1, 100),
    num_experts=st.integers(1, 6),
    k=st.integers(0, 6),
    kind=st.sampled_from(KINDS),
    biased=st.booleans(),
)
def test_twins_agree_on_drawn_shapes(native, tokens, hidden, inner, num_experts, k, kind, biased):
    *arguments, gate_up_bias, down_bias = case(tokens, tokens, hidden, inner, num_experts, min(k, num_experts), kind)
    arguments += [gate_up_bias, down_bias] if biased else []
    assert_close(native("moe")(*arguments), moe(*arguments), **TOLERANCE[kind])


@settings(max_examples=30)
@given(
    tokens=st.integers(0, 30),
    hidden=st.integers(1, 10),
    inner=st.integers(1, 10),
    num_experts=st.integers(1, 6),
    k=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
)
def test_mxfp4_gives_the_bits_of_the_same_weights_unpacked(native, tokens, hidden, inner, num_experts, k, kind):
    x, gate_up, down, *rest = case(1, tokens, 32 * hidden, 32 * inner, num_experts, min(k, num_experts), kind, MXFP4)
    actual = native("moe")(x, gate_up, down, *rest)
    assert np.array_equal(actual, native("moe")(x, unpacked(gate_up, kind), unpacked(down, kind), *rest))
    assert_close(actual, moe(x, gate_up, down, *rest), **TOLERANCE[kind])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mxfp4_at_the_ends_of_its_scales(native, kind):
    """x times 2^±120 brings them back to size 1."""
    x, gate_up, down, *rest = case(2, 6, 64, 32, 2, 2, kind, MXFP4)
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (32, 2, 1))
    for scale, factor in ((0, 2.0**120), (1, 2.0**120), (252, 2.0**-126)):
        for expert in range(2):
            for half in range(2):
                scales = np.full((32, 2), scale, np.uint8)
                pack_experts(np.roll(codes, half, axis=2), gate_up, expert, scales, half, 2)
        large = (x.astype(np.float32) * np.float32(factor)).astype(kind)
        actual = native("moe")(large, gate_up, down, *rest)
        assert np.array_equal(actual, native("moe")(large, unpacked(gate_up, kind), unpacked(down, kind), *rest))
        assert_close(actual, moe(large, gate_up, down, *rest), **TOLERANCE[kind])


def test_equals_transformers_experts(native):
    torch = pytest.importorskip("torch")
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    hidden, inner, num_experts, k, tokens = 24, 40, 5, 3, 30
    config = GptOssConfig(num_local_experts=num_experts, hidden_size=hidden, intermediate_size=inner)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    generator = rng(3)
    x = 4 * draw(generator, (tokens, hidden))  # many of gate and up are beyond the limit
    chosen = np.stack([generator.permutation(num_experts)[:k] for _ in range(tokens)])
    weights = generator.random((tokens, k), np.float32)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        expected = experts(torch.from_numpy(x), torch.from_numpy(chosen), torch.from_numpy(weights)).numpy()
    parameters = {name: parameter.detach().numpy() for name, parameter in experts.named_parameters()}
    gate_up = PackedExperts.empty(num_experts, inner, hidden, F32, gated=True)
    down = PackedExperts.empty(num_experts, hidden, inner, F32)
    for expert in range(num_experts):
        rows = np.ascontiguousarray(parameters["gate_up_proj"][expert].T)
        for half in range(2):
            pack_experts(rows[half::2], gate_up, expert, None, half, 2)
        pack_experts(np.ascontiguousarray(parameters["down_proj"][expert].T), down, expert)
    bias = parameters["gate_up_proj_bias"]
    biases = np.concatenate([bias[:, 0::2], bias[:, 1::2]], axis=1), parameters["down_proj_bias"]
    for form in (native("moe"), moe):
        actual = form(x, gate_up, down, chosen.astype(np.int32), weights, *biases)
        # Sums of 40 products of size 50 and 1, in float32, that cancel.
        assert_close(actual, expected, rtol=1e-5, atol=1e-3)


def test_alpha_and_limit(native):
    x, *rest = case(4, 9, 40, 20, 3, 2, F32)
    usual = native("moe")(10 * x, *rest)
    for alpha, limit in ((1.0, 7.0), (1.702, 0.5), (1.702, np.inf)):
        actual, expected = (form(10 * x, *rest, alpha=alpha, limit=limit) for form in (native("moe"), moe))
        assert not np.allclose(actual, usual, rtol=0.01, atol=0.01)
        assert_close(actual, expected, rtol=2e-5, atol=1e-3)  # results of size 100


@pytest.mark.parametrize("weights", [None, MXFP4], ids=["floats", "mxfp4"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_writes_only_its_rows_the_same_in_any_batch_on_any_number_of_threads(native, kind, weights):
    x, gate_up, down, chosen, shares, *biases = case(5, 290, 64, 96, 4, 2, kind, weights)
    chosen[:250] = [3, 0]  # more rows than one unit has
    with threads(1):
        alone = np.concatenate(
            [
                native("moe")(x[i : i + 1], gate_up, down, chosen[i : i + 1], shares[i : i + 1], *biases)
                for i in range(290)
            ]
        )
    for count in (3, 7, 290):
        guarded = Guarded(count, 64, kind)
        with threads(3):
            spaced = spaced_rows(x[:count]), gate_up, down, chosen[:count], spaced_rows(shares[:count]), *biases
            native("moe")(*spaced, out=guarded.out)
        guarded.check()
        assert np.array_equal(guarded.out, alone[:count])


@pytest.mark.native_speed
def test_more_tokens_than_are_computed_at_once(native):
    x, gate_up, down, chosen, shares, *biases = case(6, 2500, 16, 16, 3, 2, F32)
    whole = native("moe")(x, gate_up, down, chosen, shares, *biases)
    for begin, end in ((0, 100), (1000, 1100), (2400, 2500)):
        part = x[begin:end], gate_up, down, chosen[begin:end], shares[begin:end]
        assert np.array_equal(native("moe")(*part, *biases), whole[begin:end])


def test_nan_stays_with_its_token_and_its_expert(native):
    x, gate_up, down, chosen, shares, *biases = case(7, 8, 33, 17, 4, 2, F32)
    x[2, 5] = np.nan
    gate_up.panels[1] = np.nan
    for form in (native("moe"), moe):
        result = form(x, gate_up, down, chosen, shares, *biases)
        expected = (np.arange(8) == 2) | (chosen == 1).any(axis=1)
        assert 2 <= np.count_nonzero(expected) < 8
        assert np.array_equal(np.isnan(result), np.repeat(expected[:, None], 33, axis=1))


def test_same_refusals(native):
    x, gate_up, down, chosen, shares, gate_up_bias, down_bias = case(8, 4, 20, 10, 3, 2, F32)
    rest = chosen, shares

    def refused(*args, error=ValueError, match, **kwargs):
        assert_same_refusal(native("moe"), moe, *args, error=error, match=match, **kwargs)

    refused(x.astype(np.float16), gate_up, down, *rest, error=TypeError, match="x has dtype float16")
    refused(x.astype(BF16), gate_up, down, *rest, error=TypeError, match="gate_up has dtype float32; .* bfloat16, as x")
    refused(x, gate_up.linear(0), down, *rest, error=TypeError, match="gate_up is a PackedLinear; it must be PackedExp")
    refused(x, down, down, *rest, match="gate_up is not gated; it must be")
    refused(x, gate_up, gate_up, *rest, match="down is gated; it must not be")
    fewer = PackedExperts(down.panels[:2], 20, 10)
    refused(x, gate_up, fewer, *rest, match=r"down has 2 experts of 20 × 10; it must have 3 of 20 × 10, as gate_up")
    refused(x[:, :19], gate_up, down, *rest, match=r"x has shape \(4, 19\)")
    refused(x, gate_up, down, chosen.astype(np.int64), shares, error=TypeError, match="chosen has dtype int64")
    refused(x, gate_up, down, swapped(chosen), shares, error=TypeError, match="chosen has dtype >i4")
    refused(x, gate_up, down, chosen[0], shares, match=r"chosen has shape \(2,\)")
    refused(x, gate_up, down, chosen[:3], shares, match=r"chosen has shape \(3, 2\); it must be \(4, 2\)")
    refused(x, gate_up, down, chosen, shares[:, :1], match=r"weights has shape \(4, 1\); it must be \(4, 2\)")
    refused(x, gate_up, down, chosen, shares.astype(BF16), error=TypeError, match="weights has dtype bfloat16")
    refused(
        x, gate_up, down, *rest, gate_up_bias[:, :9], match=r"gate_up_bias has shape \(3, 9\); it must be \(3, 20\)"
    )
    refused(x, gate_up, down, *rest, gate_up_bias.T, match=r"gate_up_bias has shape \(20, 3\)")
    refused(x, gate_up, down, *rest, None, np.asfortranarray(down_bias), match="down_bias has strides")
    refused(x, gate_up, down, *rest, limit=0.0, match="limit is 0.0; it must be positive")
    refused(x, gate_up, down, *rest, limit=float("nan"), match="limit is nan")
    refused(x, gate_up, down, *rest, out=np.zeros((4, 19), np.float32), match=r"out has shape \(4, 19\)")
    for wrong in (3, -1):
        chosen[2, 1] = wrong
        refused(x, gate_up, down, *rest, match=f"chosen holds expert {wrong}; there are 3")
