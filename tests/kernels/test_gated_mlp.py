import numpy as np
import pytest

from pace.kernels import reference
from pace.reference.activate import ACTIVATIONS
from pace.reference.pack_linear import PackedLinear

from .arrays import BF16, F32, KINDS, Guarded, assert_close, assert_same_refusal, draw, rng, threads

gated_mlp, linear, pack_linear = reference("gated_mlp"), reference("linear"), reference("pack_linear")

# As linear's, and a product of two such sums.
TOLERANCE = {F32: {"rtol": 2e-5, "atol": 2e-4}, BF16: {"rtol": 2**-7, "atol": 2**-7}}


def case(seed, rows, in_features, out_features, kind):
    generator = rng(seed)
    x = draw(generator, (rows, in_features), kind)
    packed = PackedLinear.empty(out_features, in_features, kind, gated=True)
    for first in (0, 1):
        pack_linear(draw(generator, (out_features, in_features), kind, scale=0.3), packed, first, 2)
    return generator, x, packed


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [0, 1, 4, 13])
@pytest.mark.parametrize("shape", [(1, 1), (33, 17), (64, 100)], ids=str)
def test_twins_agree(native, kind, activation, rows, shape):
    generator, x, weight = case(rows, rows, *shape, kind)
    for bias in (None, draw(generator, 2 * shape[1])):
        arguments = x, weight, bias, activation
        assert_close(native("gated_mlp")(*arguments), gated_mlp(*arguments), **TOLERANCE[kind])


def test_is_two_linears_and_a_product(native):
    generator = rng(9)
    x, gate, up = draw(generator, (6, 30)), draw(generator, (20, 30)), draw(generator, (20, 30))
    packed = PackedLinear.empty(20, 30, F32, gated=True)
    native("pack_linear")(gate, packed, 0, 2)
    native("pack_linear")(up, packed, 1, 2)
    plain = native("linear")
    expected = plain(x, pack_linear(gate), activation="silu", multiply=plain(x, pack_linear(up)))
    assert np.array_equal(native("gated_mlp")(x, packed), expected)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out_are_those_of_linear(native, activation):
    gate = np.array([np.nan, np.inf, -np.inf, 10, -10, 1e4, -1e4, 1e30, -1e30], np.float32)
    packed = PackedLinear.empty(1, 2, F32, gated=True)
    pack_linear(np.array([[1, 0]], np.float32), packed, 0, 2)
    pack_linear(np.array([[0, 1]], np.float32), packed, 1, 2)
    bias = np.zeros(2, np.float32)
    one = pack_linear(np.ones((1, 1), np.float32))
    for product, plain in ((native("gated_mlp"), native("linear")), (gated_mlp, linear)):
        for value, expected in zip(gate, plain(gate[:, None], one, activation=activation)[:, 0], strict=True):
            bias[:] = value, 3  # 0 times an infinity in x would be NaN
            actual = product(np.zeros((1, 2), np.float32), packed, bias, activation)
            np.testing.assert_array_equal(actual, [[expected * np.float32(3)]])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_writes_only_its_rows_the_same_in_any_batch_on_any_number_of_threads(native, kind):
    _, x, weight = case(5, 230, 100, 45, kind)
    with threads(1):
        alone = np.concatenate([native("gated_mlp")(x[i : i + 1], weight) for i in range(len(x))])
    guarded = Guarded(230, 45, kind)
    with threads(3):
        native("gated_mlp")(x, weight, out=guarded.out)
    guarded.check()
    assert np.array_equal(guarded.out, alone)


def test_same_refusals(native):
    _, x, weight = case(7, 3, 20, 10, F32)
    plain = PackedLinear.empty(10, 20, F32)
    twins = native("gated_mlp"), gated_mlp
    assert_same_refusal(*twins, x, plain, error=ValueError, match="weight is not gated")
    assert_same_refusal(*twins, x[:, 1:], weight, error=ValueError, match=r"x has shape \(3, 19\)")
    assert_same_refusal(*twins, x, weight, np.zeros(10, np.float32), error=ValueError, match=r"bias has shape \(10,\)")
    assert_same_refusal(*twins, x, weight, activation="tanh", error=ValueError, match="activation is 'tanh'")
