import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kernels import reference
from pace.reference.activate import ACTIVATIONS

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

activate = reference("activate")

# Elementary functions within a few units of 2^-24 of values up to 40 or so, times a factor; where gelu cancels (1 + erf
# near -3), what is left of it has lost the digits before.
RTOL = {F32: 4e-6, BF16: BF16_RTOL}
ATOL = 5e-6


def inputs(generator, rows, columns, kind):
    return draw(generator, (rows, columns), kind, 4.0), draw(generator, (rows, columns), kind)


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_twins_agree(native, kind, rows, columns, activation, multiply):
    x, factors = inputs(rng(rows, columns), rows, columns, kind)
    args = x, activation, factors if multiply else None
    assert_close(native("activate")(*args), activate(*args), rtol=RTOL[kind], atol=ATOL)


@settings(max_examples=30)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_twins_agree_on_drawn_shapes(native, rows, columns, seed, kind, activation):
    x, factors = inputs(rng(seed), rows, columns, kind)
    assert_close(
        native("activate")(x, activation, factors), activate(x, activation, factors), rtol=RTOL[kind], atol=ATOL
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("columns", SIZES)
def test_reads_and_writes_only_its_rows(native, kind, columns):
    x, factors = inputs(rng(columns), 4, columns, kind)
    guarded = Guarded(4, columns, kind)
    result = native("activate")(spaced_rows(x), "silu", spaced_rows(factors), out=guarded.out)
    assert result is guarded.out
    guarded.check()
    assert_close(result, activate(x, "silu", factors), rtol=RTOL[kind], atol=ATOL)


@pytest.mark.parametrize("into", [0, 1])
def test_in_place(native, into):
    x, factors = inputs(rng(7), 3, 40, F32)
    expected = activate(x, "gelu_tanh", factors)
    out = (x, factors)[into]
    native("activate")(x, "gelu_tanh", factors, out=out)
    assert_close(out, expected, rtol=RTOL[F32], atol=ATOL)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_is_the_same_in_any_batch_on_any_number_of_threads(native, kind):
    x, factors = inputs(rng(1), 300, 1000, kind)
    with threads(1):
        alone = np.concatenate(
            [native("activate")(x[i : i + 1], "gelu_erf", factors[i : i + 1]) for i in range(len(x))]
        )
    with threads(3):
        assert np.array_equal(native("activate")(x, "gelu_erf", factors), alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_stay_where_they_are(native, activation):
    x = np.ones((1, 33), np.float32)
    x[0, 7], x[0, 32] = np.nan, np.inf
    result = native("activate")(x, activation)
    assert np.isnan(result[0, 7])
    assert result[0, 32] == np.inf
    assert np.isfinite(np.delete(result, [7, 32])).all()


def test_same_refusals(native):
    x = np.ones((2, 8), np.float32)
    twins = native("activate"), activate
    assert_same_refusal(*twins, x.astype(np.float64), "silu", error=TypeError, match="x has dtype float64")
    assert_same_refusal(*twins, x[0], "silu", error=ValueError, match=r"x has shape \(8,\)")
    assert_same_refusal(*twins, x[:, ::2], "silu", error=ValueError, match="x has strides")
    assert_same_refusal(*twins, x, "tanh", error=ValueError, match="activation is 'tanh'; it must be one of relu")
    assert_same_refusal(*twins, x, "silu", x[:1], error=ValueError, match=r"multiply has shape \(1, 8\)")
    assert_same_refusal(*twins, x, "silu", x.astype(BF16), error=TypeError, match="multiply has dtype bfloat16")
    assert_same_refusal(*twins, x, "silu", out=x[:1], error=ValueError, match=r"out has shape \(1, 8\)")
    assert_same_refusal(*twins, x, "silu", out=x.astype(BF16), error=TypeError, match="out has dtype bfloat16")
