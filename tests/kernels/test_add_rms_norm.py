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

add_rms_norm = reference("add_rms_norm")

# As rms_norm; a rounding of the sum that differs would show as far more.
RTOL = {F32: 2e-6, BF16: BF16_RTOL}
ATOL = 0.0


def inputs(generator, rows, hidden, kind, scale=1.0):
    """x, residual, weight."""
    x, residual = draw(generator, (rows, hidden), kind, scale), draw(generator, (rows, hidden), kind)
    return x, residual, draw(generator, hidden)


def rms_norm_of_sum(native, x, residual, weight, eps=1e-5):
    """What the fused form must equal to the bit."""
    total = (x.astype(F32) + residual.astype(F32)).astype(x.dtype)
    return native("rms_norm")(total, weight, eps)


def assert_twins_agree(native, x, residual, *vectors_and_eps):
    sums = [residual.copy(), residual.copy()]
    result = native("add_rms_norm")(x, sums[0], *vectors_and_eps)
    expected = add_rms_norm(x, sums[1], *vectors_and_eps)
    assert np.array_equal(sums[0], sums[1])
    assert_close(result, expected, rtol=RTOL[x.dtype], atol=ATOL)
    assert np.array_equal(result, rms_norm_of_sum(native, x, residual, *vectors_and_eps))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_twins_agree(native, kind, rows, hidden):
    assert_twins_agree(native, *inputs(rng(rows, hidden), rows, hidden, kind), 1e-6)


@settings(max_examples=30)
@given(rows=st.integers(0, 9), hidden=st.integers(1, 300), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_twins_agree_on_drawn_shapes(native, rows, hidden, seed, kind):
    assert_twins_agree(native, *inputs(rng(seed), rows, hidden, kind, scale=10))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hidden", SIZES)
def test_reads_and_writes_only_its_rows(native, kind, hidden):
    x, residual, weight = inputs(rng(hidden), 4, hidden, kind)
    total, guarded = Guarded(4, hidden, kind, extra=7), Guarded(4, hidden, kind)
    total.out[...] = residual
    result = native("add_rms_norm")(spaced_rows(x), total.out, weight, out=guarded.out)
    assert result is guarded.out
    total.check()
    guarded.check()
    assert_close(result, add_rms_norm(x, residual, weight), rtol=RTOL[kind], atol=ATOL)
    assert np.array_equal(total.out, residual)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_out_may_be_x(native, kind):
    x, residual, weight = inputs(rng(7), 3, 40, kind)
    expected = rms_norm_of_sum(native, x, residual, weight)
    native("add_rms_norm")(x, residual, weight, out=x)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_is_the_same_in_any_batch_on_any_number_of_threads(native, kind):
    x, residual, weight = inputs(rng(1), 300, 1000, kind)
    with threads(1):
        total = residual.copy()
        rows = [slice(i, i + 1) for i in range(len(x))]
        alone = np.concatenate([native("add_rms_norm")(x[row], total[row], weight) for row in rows])
    with threads(3):
        assert np.array_equal(native("add_rms_norm")(x, residual, weight), alone)
    assert np.array_equal(residual, total)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_and_infinity_stay_in_their_row(native, kind, value):
    x, residual, ones = np.ones((3, 33), kind), np.ones((3, 33), kind), np.ones(33, np.float32)
    x[1, 32] = value
    result = native("add_rms_norm")(x, residual, ones).astype(F32)
    assert np.isnan(result[1, 32])
    assert np.isfinite(result[[0, 2]]).all()
    assert np.array_equal(residual[1, 32:].astype(F32), [np.float32(value)], equal_nan=True)
    assert (residual[[0, 2]] == 2).all()


def test_residual_and_out_may_be_columns_of_one_matrix(native):
    x, residual, weight = inputs(rng(8), 3, 40, F32)
    wide = np.concatenate([residual, residual], axis=1)
    left, right = wide[:, :40], wide[:, 40:]
    expected = native("add_rms_norm")(x, residual, weight)
    native("add_rms_norm")(x, left, weight, out=right)
    assert np.array_equal(right, expected)
    assert np.array_equal(left, residual)


def test_same_refusals(native):
    x, residual = np.ones((2, 8), np.float32), np.ones((2, 8), np.float32)
    weight = np.ones(8, np.float32)
    frozen = residual.copy()
    frozen.flags.writeable = False

    def refused(x, residual, *args, **kwargs):
        assert_same_refusal(native("add_rms_norm"), add_rms_norm, x, residual, *args, **kwargs)

    refused(x.astype(np.float64), residual, weight, error=TypeError, match="x has dtype float64")
    refused(x[0], residual, weight, error=ValueError, match=r"x has shape \(8,\)")
    refused(x[:, ::2], residual, weight, error=ValueError, match="x has strides")
    refused(x, residual[:1], weight, error=ValueError, match=r"residual has shape \(1, 8\)")
    refused(x, residual[:, :7], weight, error=ValueError, match=r"residual has shape \(2, 7\)")
    refused(x, np.ones((2, 16), F32)[:, ::2], weight, error=ValueError, match="residual has strides")
    refused(x, residual.astype(BF16), weight, error=TypeError, match="residual has dtype bfloat16")
    refused(x, frozen, weight, error=ValueError, match="residual is read-only")
    refused(x, residual, weight[:7], error=ValueError, match=r"weight has shape \(7,\)")
    refused(x, residual, weight.astype(BF16), error=TypeError, match="weight has dtype bfloat16")
    refused(x, residual, weight, out=x[:1], error=ValueError, match=r"out has shape \(1, 8\)")
    refused(x, residual, weight, out=x.astype(BF16), error=TypeError, match="out has dtype bfloat16")
    refused(x, residual, weight, out=frozen, error=ValueError, match="out is read-only")
    for view in (residual, residual[:], residual[::-1]):
        refused(x, residual, weight, out=view, error=ValueError, match="out shares memory with residual")
    assert (residual == 1).all(), "a refused call wrote"
