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

rms_norm = reference("rms_norm")

# The order of a sum of n squares: n/2 roundings of 2^-24 at worst, far fewer in practice.
RTOL = {F32: 2e-6, BF16: BF16_RTOL}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_twins_agree(native, kind, rows, hidden):
    generator = rng(rows, hidden)
    x, weight = draw(generator, (rows, hidden), kind), draw(generator, hidden)
    assert_close(native("rms_norm")(x, weight, 1e-6), rms_norm(x, weight, 1e-6), rtol=RTOL[kind])


@settings(max_examples=30)
@given(rows=st.integers(0, 9), hidden=st.integers(1, 300), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_twins_agree_on_drawn_shapes(native, rows, hidden, seed, kind):
    generator = rng(seed)
    x, weight = draw(generator, (rows, hidden), kind, scale=10), draw(generator, hidden)
    assert_close(native("rms_norm")(x, weight), rms_norm(x, weight), rtol=RTOL[kind])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("hidden", SIZES)
def test_reads_and_writes_only_its_rows(native, kind, hidden):
    generator = rng(hidden)
    x, weight = draw(generator, (4, hidden), kind), draw(generator, hidden)
    guarded = Guarded(4, hidden, kind)
    result = native("rms_norm")(spaced_rows(x), weight, out=guarded.out)
    assert result is guarded.out
    guarded.check()
    assert_close(result, rms_norm(x, weight), rtol=RTOL[kind])


def test_in_place(native):
    generator = rng(7)
    x, weight = draw(generator, (3, 40)), draw(generator, 40)
    expected = rms_norm(x, weight)
    native("rms_norm")(x, weight, out=x)
    assert_close(x, expected, rtol=RTOL[F32])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_is_the_same_in_any_batch_on_any_number_of_threads(native, kind):
    generator = rng(1)
    x, weight = draw(generator, (300, 1000), kind), draw(generator, 1000)
    with threads(1):
        alone = np.concatenate([native("rms_norm")(x[i : i + 1], weight) for i in range(len(x))])
    with threads(3):
        assert np.array_equal(native("rms_norm")(x, weight), alone)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(native, value):
    x, weight = np.ones((3, 33), np.float32), np.ones(33, np.float32)
    x[1, 32] = value
    result = native("rms_norm")(x, weight)
    assert np.isnan(result[1, 32])
    assert np.isfinite(result[[0, 2]]).all()


def test_same_refusals(native):
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    twins = native("rms_norm"), rms_norm
    assert_same_refusal(*twins, x.astype(np.float64), weight, error=TypeError, match="x has dtype float64")
    assert_same_refusal(*twins, x[0], weight, error=ValueError, match=r"x has shape \(8,\)")
    assert_same_refusal(*twins, x[:, ::2], weight[:4], error=ValueError, match="x has strides")
    assert_same_refusal(*twins, x, weight[:7], error=ValueError, match=r"weight has shape \(7,\)")
    assert_same_refusal(*twins, x, weight.astype(BF16), error=TypeError, match="weight has dtype bfloat16")
    assert_same_refusal(*twins, x, weight, out=x[:1], error=ValueError, match=r"out has shape \(1, 8\)")
    assert_same_refusal(*twins, x, weight, out=x.astype(BF16), error=TypeError, match="out has dtype bfloat16")
