import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kernels import reference

from .arrays import BF16, F32, KINDS, assert_same_refusal, draw, misaligned, rng, swapped, threads

rope = reference("rope")

HALVES = [1, 2, 5, 8, 15, 16, 17, 32, 40, 64]
MAX_POSITIONS = 50


def inputs(generator, tokens, heads, kv_heads, head_dim, half, kind):
    """q, k, cos, sin, positions; q and k are views into one QKV matrix, with v and a guard after them."""
    qkv = draw(generator, (tokens, (heads + 2 * kv_heads) * head_dim + 3), kind)
    q, k = np.split(qkv, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)[:2]
    angles = generator.uniform(-10, 10, (MAX_POSITIONS, half))
    positions = generator.integers(0, MAX_POSITIONS, tokens, np.int32)
    q, k = q.reshape(tokens, heads, head_dim), k.reshape(tokens, kv_heads, head_dim)
    assert np.shares_memory(q, qkv) or not tokens
    return q, k, np.cos(angles).astype(F32), np.sin(angles).astype(F32), positions


def assert_twins_agree(native, q, k, *args):
    """To the bit, and in the whole matrix that q and k are views of."""
    matrix = q.base
    before = matrix.copy()
    assert native("rope")(q, k, *args) is None
    actual = matrix.copy()
    matrix[...] = before
    assert rope(q, k, *args) is None
    assert np.array_equal(actual, matrix)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("rest", [0, 3, 16])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_twins_agree(native, kind, tokens, half, rest, interleaved):
    q, k, *tables = inputs(rng(tokens, half), tokens, 4, 2, 2 * half + rest, half, kind)
    assert_twins_agree(native, q, k, *tables, interleaved)


@settings(max_examples=50)
@given(data=st.data(), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS), interleaved=st.booleans())
def test_twins_agree_on_drawn_shapes(native, data, seed, kind, interleaved):
    tokens, half, rest = (data.draw(st.integers(low, high)) for low, high in [(1, 9), (0, 70), (0, 20)])
    heads, kv_heads = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    q, k, *tables = inputs(rng(seed), tokens, heads, kv_heads, 2 * half + rest or 1, half, kind)
    assert_twins_agree(native, q, k, *tables, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotates_each_pair_by_its_angle(native, interleaved):
    """Against complex multiplication, and nothing past rotary_dim is touched."""
    half, rest = 20, 7
    q, k, cos, sin, positions = inputs(rng(3), 5, 3, 1, 2 * half + rest, half, F32)
    pairs = [slice(0, 2 * half, 2), slice(1, 2 * half, 2)] if interleaved else [slice(half), slice(half, 2 * half)]
    before = q.astype(np.float64)
    turned = (before[..., pairs[0]] + 1j * before[..., pairs[1]]) * (cos + 1j * sin)[positions][:, None]
    native("rope")(q, k, cos, sin, positions, interleaved)
    np.testing.assert_allclose(q[..., pairs[0]], turned.real, atol=1e-6)
    np.testing.assert_allclose(q[..., pairs[1]], turned.imag, atol=1e-6)
    assert np.array_equal(q[..., 2 * half :], before[..., 2 * half :])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_token_is_the_same_in_any_batch_on_any_number_of_threads(native, kind, interleaved):
    q, k, cos, sin, positions = inputs(rng(1), 200, 8, 2, 80, 33, kind)
    alone = [q.copy(), k.copy()]
    with threads(1):
        for i in range(len(q)):
            one = slice(i, i + 1)
            native("rope")(alone[0][one], alone[1][one], cos, sin, positions[one], interleaved)
    with threads(3):
        native("rope")(q, k, cos, sin, positions, interleaved)
    assert np.array_equal(q, alone[0])
    assert np.array_equal(k, alone[1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_pair(native, value, interleaved):
    q, k, cos, sin, positions = inputs(rng(2), 2, 2, 1, 34, 17, F32)
    q[1, 0, 16] = value
    native("rope")(q, k, cos, sin, positions, interleaved)
    bad = np.zeros(q.shape, bool)
    bad[1, 0, [16, 17] if interleaved else [16, 33]] = True
    assert np.array_equal(~np.isfinite(q), bad)
    assert np.isfinite(k).all()


def test_same_refusals(native):
    q, k, cos, sin, positions = inputs(rng(4), 3, 4, 2, 16, 8, F32)
    before = q.base.copy()
    frozen = q.copy()
    frozen.flags.writeable = False

    def refused(q, k, cos, sin, positions, **kwargs):
        assert_same_refusal(native("rope"), rope, q, k, cos, sin, positions, **kwargs)

    for wrong in (-1, MAX_POSITIONS):
        moved = positions.copy()
        moved[2] = wrong
        match = rf"positions\[2\] is {wrong}; the tables have {MAX_POSITIONS} positions"
        refused(q, k, cos, sin, moved, error=ValueError, match=match)
    refused(q.astype(np.float64), k, cos, sin, positions, error=TypeError, match="q has dtype float64")
    refused(q[0], k, cos, sin, positions, error=ValueError, match=r"q has shape \(4, 16\)")
    refused(q[..., ::2], k, cos, sin, positions, error=ValueError, match="q has strides")
    refused(q[:, ::2], k, cos, sin, positions, error=ValueError, match="q has strides")
    refused(q, k.astype(BF16), cos, sin, positions, error=TypeError, match="k has dtype bfloat16")
    refused(q, k[:2], cos, sin, positions, error=ValueError, match=r"k has shape \(2, 2, 16\)")
    refused(q, k[..., :15], cos, sin, positions, error=ValueError, match=r"k has shape \(3, 2, 15\)")
    refused(frozen, k, cos, sin, positions, error=ValueError, match="q is read-only")
    refused(q, frozen, cos, sin, positions, error=ValueError, match="k is read-only")
    refused(q, k, cos.astype(BF16), sin, positions, error=TypeError, match="cos has dtype bfloat16")
    refused(q, k, cos, sin[0], positions, error=ValueError, match=r"sin has shape \(8,\)")
    refused(q, k, cos, sin[:, ::2], positions, error=ValueError, match="sin has strides")
    refused(q, k, cos, sin[:40], positions, error=ValueError, match=r"sin has shape \(40, 8\)")
    wide = np.ones((MAX_POSITIONS, 9), F32)
    refused(q, k, wide, wide, positions, error=ValueError, match=rf"cos has shape \({MAX_POSITIONS}, 9\)")
    refused(q, k, cos, sin, positions[:2], error=ValueError, match=r"positions has shape \(2,\)")
    refused(q, k, cos, sin, positions.astype(np.int64), error=TypeError, match="positions has dtype int64")
    refused(swapped(q), k, cos, sin, positions, error=TypeError, match="q has dtype >")
    refused(q, k, misaligned(cos), sin, positions, error=ValueError, match="cos is not aligned")
    refused(q, k, cos, swapped(sin), positions, error=TypeError, match="sin has dtype >f4; it must be float32")
    refused(q, k, cos, sin, swapped(positions), error=TypeError, match="positions has dtype >i4; it must be int32")
    assert np.array_equal(q.base, before), "a refused call wrote"
