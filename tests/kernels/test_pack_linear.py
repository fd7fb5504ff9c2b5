import numpy as np
import pytest

from pace.kernels import reference
from pace.reference.pack_linear import PackedLinear, unpack_linear

from .arrays import BF16, F32, KINDS, assert_same_refusal, draw, frozen, rng, spaced_rows, threads

pack_linear = reference("pack_linear")

SHAPES = [(3, 0), (0, 5), (1, 1), (16, 2), (17, 33), (40, 15), (100, 577), (64, 128)]


@pytest.mark.parametrize("into_kind", KINDS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twins_write_the_same_bits(native, shape, kind, into_kind):
    weight = rng(*shape).standard_normal(shape).astype(np.float32).astype(kind)
    packed = [form(weight, PackedLinear.empty(*shape, into_kind)) for form in (native("pack_linear"), pack_linear)]
    assert np.array_equal(*(p.panels.view(np.uint8) for p in packed))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacks_to_itself(native, shape, kind):
    weight = draw(rng(1), shape, kind)
    assert np.array_equal(unpack_linear(native("pack_linear")(spaced_rows(weight))), weight.astype(np.float32))


def test_bfloat16_is_copied_bit_by_bit(native):
    for columns in range(1, 70):
        bits = np.arange(1, 1 + 17 * columns, dtype=np.uint16) % 127 + 1  # denormals
        weight = (bits | (bits % 2) << 15).view(BF16).reshape(17, columns)
        native_bits, bits = (form(weight).panels.view(np.uint16) for form in (native("pack_linear"), pack_linear))
        assert np.array_equal(native_bits, bits), columns


def test_several_weights_in_one(native):
    generator = rng(2)
    gate, up = draw(generator, (40, 30), BF16), draw(generator, (40, 30), BF16)
    packed = PackedLinear.empty(40, 30, BF16, gated=True)
    with threads(2):
        native("pack_linear")(gate, packed, 0, 2)
        native("pack_linear")(up, packed, 1, 2)
    assert np.array_equal(unpack_linear(packed), np.stack([gate, up]).astype(np.float32))


@pytest.mark.parametrize("into_kind", KINDS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_anywhere_is_refused_and_infinity_is_not(native, kind, into_kind):
    for place in [(0, 0), (19, 34), (7, 33)]:
        weight = np.ones((20, 35), kind)
        weight[0, 1] = weight[3, 32] = np.inf
        for form in (native("pack_linear"), pack_linear):
            form(weight, PackedLinear.empty(20, 35, into_kind))
        weight[place] = np.nan
        assert_same_refusal(
            native("pack_linear"),
            pack_linear,
            weight,
            PackedLinear.empty(20, 35, into_kind),
            error=ValueError,
            match="weight holds NaN",
        )


def test_same_refusals(native):
    twins = native("pack_linear"), pack_linear
    weight = np.zeros((20, 8), np.float32)
    into = PackedLinear.empty(20, 8, F32)
    assert_same_refusal(*twins, weight.astype(np.float16), error=TypeError, match="weight has dtype float16")
    assert_same_refusal(*twins, weight[:, :7], into, error=ValueError, match=r"weight has shape \(20, 7\)")
    assert_same_refusal(
        *twins, weight, into, 1, error=ValueError, match="2 panels from 1 in steps of 1 do not fit the 2"
    )
    read_only = PackedLinear(frozen(into.panels), 20, 8)
    assert_same_refusal(*twins, weight, read_only, error=ValueError, match="into.panels is read-only")
    with pytest.raises(TypeError, match="dtype is float16"):
        PackedLinear.empty(1, 1, np.dtype(np.float16))


def test_panels_are_checked_against_the_features():
    panels = np.zeros((2, 8, 16), np.float32)
    for features, gated in (((33, 8), False), ((16, 8), False), ((32, 9), False), ((17, 8), True)):
        with pytest.raises(ValueError, match=r"panels has shape \(2, 8, 16\); it must be "):
            PackedLinear(panels, *features, gated)
    with pytest.raises(ValueError, match=r"it must be \(4, 8, 16\) \(17 × 8, gated\)"):
        PackedLinear(panels, 17, 8, gated=True)
    with pytest.raises(ValueError, match="panels has strides"):
        PackedLinear(np.zeros((2, 8, 32), np.float32)[..., ::2], 32, 8)
    with pytest.raises(TypeError, match="panels has dtype float16"):
        PackedLinear(panels.astype(np.float16), 32, 8)
