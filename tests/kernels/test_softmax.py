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

softmax = reference("softmax")

# e^x within an ulp of each form, of differences up to 60 that are off by 2^-24 of them, and sums of up to 1000 terms.
RTOL = {F32: 1e-5, BF16: BF16_RTOL}
ATOL = 1e-30  # denormal ends


@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_twins_agree(native, kind, rows, columns, scale):
    x = draw(rng(rows, columns), (rows, columns), kind, 10.0)
    assert_close(native("softmax")(x, scale), softmax(x, scale), rtol=RTOL[kind], atol=ATOL)


@settings(max_examples=30)
@given(rows=st.integers(0, 9), columns=st.integers(1, 300), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_twins_agree_on_drawn_shapes(native, rows, columns, seed, kind):
    x = draw(rng(seed), (rows, columns), kind, 3.0)
    assert_close(native("softmax")(x), softmax(x), rtol=RTOL[kind], atol=ATOL)


@pytest.mark.parametrize("columns", [1, 16, 17, 50000])
def test_probabilities(native, columns):
    """They add up to 1, whatever is added to all of a row, and however far apart they are."""
    x = (draw(rng(columns), (2, columns), F32, 10.0) + np.float32([[1000], [-1000]])).round(1)
    result = native("softmax")(x).astype(np.float64)
    assert result.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)  # 50000 terms of 2^-24 each
    exact = np.exp(x.astype(np.float64) - x.astype(np.float64).max(1, keepdims=True))
    np.testing.assert_allclose(result, exact / exact.sum(1, keepdims=True), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("columns", SIZES)
def test_reads_and_writes_only_its_rows(native, kind, columns):
    x = draw(rng(columns), (4, columns), kind)
    guarded = Guarded(4, columns, kind)
    result = native("softmax")(spaced_rows(x), out=guarded.out)
    assert result is guarded.out
    guarded.check()
    assert_close(result, softmax(x), rtol=RTOL[kind], atol=ATOL)


def test_in_place(native):
    x = draw(rng(7), (3, 40))
    expected = softmax(x)
    native("softmax")(x, out=x)
    assert_close(x, expected, rtol=RTOL[F32], atol=ATOL)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_is_the_same_in_any_batch_on_any_number_of_threads(native, kind):
    x = draw(rng(1), (300, 1000), kind)
    with threads(1):
        alone = np.concatenate([native("softmax")(x[i : i + 1]) for i in range(len(x))])
    with threads(3):
        assert np.array_equal(native("softmax")(x), alone)


def test_what_is_masked_has_no_probability(native):
    x = draw(rng(2), (2, 33))
    x[:, [3, 32]] = -np.inf
    result = native("softmax")(x)
    assert (result[:, [3, 32]] == 0).all()
    assert_close(result, softmax(x), rtol=RTOL[F32], atol=ATOL)


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf] * 33])
def test_what_is_none_is_nan_in_its_row(native, values):
    x = np.ones((3, 33), np.float32)
    x[1, : len(values)] = values
    for form in native("softmax"), softmax:
        result = form(x)
        assert np.isnan(result[1]).all()
        assert np.isfinite(result[[0, 2]]).all()


def test_same_refusals(native):
    x = np.ones((2, 8), np.float32)
    twins = native("softmax"), softmax
    assert_same_refusal(*twins, x.astype(np.float64), error=TypeError, match="x has dtype float64")
    assert_same_refusal(*twins, x[0], error=ValueError, match=r"x has shape \(8,\)")
    assert_same_refusal(*twins, x[:, ::2], error=ValueError, match="x has strides")
    assert_same_refusal(*twins, x, out=x[:1], error=ValueError, match=r"out has shape \(1, 8\)")
    assert_same_refusal(*twins, x, out=x.astype(BF16), error=TypeError, match="out has dtype bfloat16")
