import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kernels import reference

from .arrays import (
    BF16,
    BF16_RTOL,
    F32,
    KINDS,
    SIZES,
    Guarded,
    assert_close,
    assert_same_refusal,
    draw,
    rng,
    spaced_rows,
    threads,
)

layer_norm = reference("layer_norm")

# Terms are near 1 and may cancel: the order of the two sums costs a few roundings of 2^-24 of the largest of them.
RTOL = {F32: 2e-6, BF16: BF16_RTOL}
ATOL = 5e-6


def inputs(generator, rows, hidden, kind, scale=1.0):
    return draw(generator, (rows, hidden), kind, scale), draw(generator, hidden), draw(generator, hidden)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_twins_agree(native, kind, rows, hidden, with_bias):
    x, weight, bias = inputs(rng(rows, hidden), rows, hidden, kind)
    args = x, weight, bias if with_bias else None, 1e-6
    assert_close(native("layer_norm")(*args), layer_norm(*args), rtol=RTOL[kind], atol=ATOL)


@settings(max_examples=30)
@given(rows=st.integers(0, 9), hidden=st.integers(1, 300), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_twins_agree_on_drawn_shapes(native, rows, hidden, seed, kind):
    args = inputs(rng(seed), rows, hidden, kind, scale=10)
    assert_close(native("layer_norm")(*args), layer_norm(*args), rtol=RTOL[kind], atol=ATOL)


@pytest.mark.parametrize("hidden", [33, 1000])
def test_a_large_mean_does_not_drown_the_variance(native, hidden):
    generator = rng(hidden)
    x = (4096 + draw(generator, (3, hidden)).round(2)).astype(F32)
    weight, bias = draw(generator, hidden), draw(generator, hidden)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5) * weight + bias
    # The float32 mean of values near 4096 is off by up to a few of their units in the last place, 2^-11.
    assert_close(native("layer_norm")(x, weight, bias), exact.astype(F32), rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hidden", SIZES)
def test_reads_and_writes_only_its_rows(native, kind, hidden):
    x, weight, bias = inputs(rng(hidden), 4, hidden, kind)
    guarded = Guarded(4, hidden, kind)
    result = native("layer_norm")(spaced_rows(x), weight, bias, out=guarded.out)
    assert result is guarded.out
    guarded.check()
    assert_close(result, layer_norm(x, weight, bias), rtol=RTOL[kind], atol=ATOL)


def test_in_place(native):
    x, weight, bias = inputs(rng(7), 3, 40, F32)
    expected = layer_norm(x, weight, bias)
    native("layer_norm")(x, weight, bias, out=x)
    assert_close(x, expected, rtol=RTOL[F32], atol=ATOL)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_is_the_same_in_any_batch_on_any_number_of_threads(native, kind):
    x, weight, bias = inputs(rng(1), 300, 1000, kind)
    with threads(1):
        alone = np.concatenate([native("layer_norm")(x[i : i + 1], weight, bias) for i in range(len(x))])
    with threads(3):
        assert np.array_equal(native("layer_norm")(x, weight, bias), alone)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(native, value):
    x, ones = np.ones((3, 33), np.float32), np.ones(33, np.float32)
    x[1, 32] = value
    result = native("layer_norm")(x, ones, ones)
    assert np.isnan(result[1]).all()
    assert np.isfinite(result[[0, 2]]).all()


def test_same_refusals(native):
    x, weight, bias = np.ones((2, 8), np.float32), np.ones(8, np.float32), np.ones(8, np.float32)
    twins = native("layer_norm"), layer_norm
    assert_same_refusal(*twins, x.astype(np.float64), weight, bias, error=TypeError, match="x has dtype float64")
    assert_same_refusal(*twins, x[0], weight, bias, error=ValueError, match=r"x has shape \(8,\)")
    assert_same_refusal(*twins, x[:, ::2], weight[:4], bias[:4], error=ValueError, match="x has strides")
    assert_same_refusal(*twins, x, weight[:7], bias, error=ValueError, match=r"weight has shape \(7,\)")
    assert_same_refusal(*twins, x, weight.astype(BF16), bias, error=TypeError, match="weight has dtype bfloat16")
    assert_same_refusal(*twins, x, weight, bias[:7], error=ValueError, match=r"bias has shape \(7,\)")
    assert_same_refusal(*twins, x, weight, bias.astype(BF16), error=TypeError, match="bias has dtype bfloat16")
    assert_same_refusal(*twins, x, weight, np.ones(16, F32)[::2], error=ValueError, match="bias has strides")
    assert_same_refusal(*twins, x, weight, bias, out=x[:1], error=ValueError, match=r"out has shape \(1, 8\)")
    assert_same_refusal(*twins, x, weight, bias, out=x.astype(BF16), error=TypeError, match="out has dtype bfloat16")
