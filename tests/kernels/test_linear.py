import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kernels import reference
from pace.reference.activate import ACTIVATIONS, erf

from .arrays import (
    BF16,
    F32,
    KINDS,
    Guarded,
    assert_close,
    assert_same_refusal,
    draw,
    misaligned,
    rng,
    spaced_rows,
    swapped,
    threads,
)

linear, pack_linear = reference("linear"), reference("pack_linear")


def tolerance(kind, in_features):
    """A sum of K products of normal numbers has a size of about √K and, in another order, an error of about √K · 2^-24
    of that; the activations add a few ulp. bfloat16 rounds the result to 8 bits.
    """
    size = math.sqrt(in_features)
    return {"rtol": 2**-7 if kind == BF16 else 1e-5, "atol": 2e-6 * size if kind == F32 else 2**-8}


def case(seed, rows, in_features, out_features, kind):
    generator = rng(seed)
    x, weight = draw(generator, (rows, in_features), kind), draw(generator, (out_features, in_features), kind)
    return generator, x, pack_linear(weight)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 11, 12, 13, 25, 200])
@pytest.mark.parametrize("shape", [(1, 1), (33, 17), (64, 100), (577, 40)], ids=str)
def test_twins_agree(native, kind, rows, shape):
    _, x, weight = case(rows, rows, *shape, kind)
    assert_close(native("linear")(x, weight), linear(x, weight), **tolerance(kind, shape[0]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_epilogues(native, kind, activation):
    generator, x, weight = case(1, 5, 31, 45, kind)
    bias = draw(generator, 45)
    for out_kind in KINDS:
        multiply, residual = draw(generator, (5, 45), out_kind), draw(generator, (5, 45), out_kind)
        for extra in ({}, {"multiply": multiply}, {"residual": residual}, {"multiply": multiply, "residual": residual}):
            arguments = {"bias": bias, "activation": activation, "out_dtype": out_kind, **extra}
            actual, expected = native("linear")(x, weight, **arguments), linear(x, weight, **arguments)
            # multiply can enlarge, and residual cancel, what was rounded before
            assert_close(actual, expected, rtol=2**-6 if out_kind == BF16 else 1e-5, atol=2e-5)


@settings(max_examples=40)
@given(
    rows=st.integers(0, 30),
    in_features=st.integers(1, 200),
    out_features=st.integers(1, 100),
    kind=st.sampled_from(KINDS),
    activation=st.sampled_from([None, *ACTIVATIONS]),
)
def test_twins_agree_on_drawn_shapes(native, rows, in_features, out_features, kind, activation):
    generator, x, weight = case(2, rows, in_features, out_features, kind)
    bias = draw(generator, out_features)
    actual, expected = (f(x, weight, bias, activation) for f in (native("linear"), linear))
    assert_close(actual, expected, **tolerance(kind, in_features))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("out_features", [1, 16, 31, 33])
def test_reads_and_writes_only_its_rows(native, kind, out_features):
    _, x, weight = case(3, 14, 37, out_features, kind)
    guarded = Guarded(14, out_features, kind)
    native("linear")(spaced_rows(x), weight, out=guarded.out)
    guarded.check()
    assert_close(guarded.out, linear(x, weight), **tolerance(kind, 37))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_without_input_features_is_the_bias(native, rows, kind):
    x, bias = np.empty((rows, 0), kind), np.array([1, 2, 3], np.float32)
    for pack in (native("pack_linear"), pack_linear):
        weight = pack(np.empty((3, 0), kind))
        for form in (native("linear"), linear):
            assert np.array_equal(form(x, weight, bias), np.tile(bias.astype(kind), (rows, 1)))


def test_residual_in_place(native):
    generator, x, weight = case(4, 3, 20, 20, BF16)
    residual = draw(generator, (3, 20), BF16)
    expected = native("linear")(x, weight, residual=residual)
    native("linear")(x, weight, residual=residual, out=residual)
    assert np.array_equal(residual, expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_is_the_same_in_any_batch_on_any_number_of_threads(native, kind):
    _, x, weight = case(5, 230, 300, 90, kind)
    with threads(1):
        alone = np.concatenate([native("linear")(x[i : i + 1], weight) for i in range(len(x))])
    with threads(3):
        for rows in (2, 5, 13, 230):
            assert np.array_equal(native("linear")(x[:rows], weight), alone[:rows])


def test_nan_stays_in_its_row_and_column(native):
    _, x, _ = case(6, 3, 20, 1, F32)
    weight = pack_linear(np.ones((40, 20), np.float32))
    weight.panels[2, 3, 1] = np.nan  # row 33
    x[1, 0] = np.inf
    result = native("linear")(x, weight)
    assert np.isnan(result[:, 33]).all()
    assert np.isinf(np.delete(result[1], 33)).all()
    assert np.isfinite(np.delete(result[[0, 2]], 33, axis=1)).all()


def test_error_function():
    x = np.linspace(-5, 5, 1001, dtype=np.float32)
    np.testing.assert_allclose(erf(x), [math.erf(v) for v in x], atol=2e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_equal_torch(native, activation):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x = np.linspace(-30, 30, 4001, dtype=np.float32)[:, None]
    expected = {
        "relu": functional.relu,
        "silu": functional.silu,
        "gelu_erf": functional.gelu,
        "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
    }[activation](torch.from_numpy(x).double())
    one = pack_linear(np.ones((1, 1), np.float32))
    for form in (native("linear"), linear):
        # near -5, gelu is 2.5 times what erf and tanh, within 4e-7 of -1, lack to -1
        np.testing.assert_allclose(form(x, one, activation=activation), expected.numpy(), rtol=1e-5, atol=1.5e-6)


FAR = np.array([np.nan, np.inf, -np.inf, 10, -10, 1e4, -1e4, 1e30, -1e30], np.float32)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(native, activation):
    """The positive half is x itself and the negative 0; silu and gelu multiply -inf by 0."""
    one = pack_linear(np.ones((1, 1), np.float32))
    expected = np.where(FAR < 0, 0, FAR)
    if activation != "relu":
        expected[np.isneginf(FAR)] = np.nan
    for form in (native("linear"), linear):
        actual = form(FAR[:, None], one, activation=activation)[:, 0]
        atol = 5e-4 if activation == "silu" else 0  # silu(-10)
        np.testing.assert_allclose(actual, expected, rtol=1e-4 if activation == "silu" else 0, atol=atol)


def test_same_refusals(native):
    generator, x, weight = case(7, 3, 20, 10, F32)
    gated = type(weight).empty(10, 20, F32, gated=True)
    wrong = np.zeros((3, 9), np.float32)

    def refused(*args, error=ValueError, match, **kwargs):
        assert_same_refusal(native("linear"), linear, *args, error=error, match=match, **kwargs)

    refused(x[:, :19], weight, match=r"x has shape \(3, 19\)")
    refused(x.astype(BF16), weight, error=TypeError, match="x has dtype bfloat16; it must be float32, as the weight")
    refused(x, gated, match="weight is gated")
    refused(swapped(x), weight, error=TypeError, match="x has dtype >f4; it must be float32 or bfloat16")
    refused(misaligned(x), weight, match="x is not aligned")
    refused(x, weight, bias=swapped(wrong[0]), error=TypeError, match="bias has dtype >f4")
    refused(x, weight, multiply=misaligned(np.zeros((3, 10), np.float32)), match="multiply is not aligned")
    refused(x, weight, residual=swapped(np.zeros((3, 10), np.float32)), error=TypeError, match="residual has dtype >f4")
    refused(x, weight, activation="swish", match="activation is 'swish'")
    refused(x, weight, bias=wrong[0], match=r"bias has shape \(9,\)")
    refused(x, weight, multiply=wrong, match=r"multiply has shape \(3, 9\)")
    refused(x, weight, residual=draw(generator, (3, 10), BF16), error=TypeError, match="residual has dtype bfloat16")
    refused(x, weight, residual=np.zeros((2, 10), np.float32), match=r"residual has shape \(2, 10\)")
    refused(x, weight, out_dtype=np.float64, error=TypeError, match="out_dtype is float64")
    refused(x, weight, out=wrong, match=r"out has shape \(3, 9\)")
