import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kernels import reference
from pace.reference.pack_experts import MXFP4, PackedExperts, unpack_experts
from pace.reference.pack_linear import unpack_linear

from .arrays import BF16, F32, KINDS, assert_same_refusal, draw, frozen, misaligned, rng, spaced_rows, threads

pack_experts = reference("pack_experts")

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def drawn_blocks(generator, rows, blocks, scales=(118, 128)):
    """MXFP4 as a checkpoint has it: codes and scales."""
    codes = generator.integers(0, 256, (rows, blocks, 16), np.uint8)
    return codes, generator.integers(*scales, (rows, blocks), np.uint8)


def values_of(codes, scales):
    """The definition, a number at a time."""
    rows, blocks = scales.shape
    values = np.empty((rows, blocks, 32))
    values[..., 0::2], values[..., 1::2] = VALUES[codes & 15], VALUES[codes >> 4]
    return (values * 2.0 ** (scales.astype(int)[..., None] - 127)).reshape(rows, 32 * blocks)


@settings(max_examples=40)
@given(rows=st.integers(0, 70), blocks=st.integers(0, 5), expert=st.integers(0, 2))
def test_twins_write_the_same_bits_and_only_theirs(native, rows, blocks, expert):
    codes, scales = drawn_blocks(rng(rows, blocks), rows, blocks, (0, 253))
    packed = []
    for form in (native("pack_experts"), pack_experts):
        into = PackedExperts.empty(3, rows, 32 * blocks, MXFP4)
        into.panels[...] = 77
        assert form(codes, into, expert, scales) is into
        assert (np.delete(into.panels, expert, axis=0) == 77).all()
        packed.append(into.panels[expert])
    assert np.array_equal(*packed)


@pytest.mark.parametrize("rows", [1, 16, 45])
def test_mxfp4_unpacks_to_its_values(native, rows):
    codes, scales = drawn_blocks(rng(rows), rows, 3, (2, 253))
    into = PackedExperts.empty(1, rows, 96, MXFP4)
    native("pack_experts")(codes, into, 0, scales)
    unpacked = unpack_experts(into, 0)
    assert np.array_equal(unpacked, values_of(codes, scales))
    assert np.array_equal(unpacked.astype(BF16).astype(np.float32), unpacked)


def test_what_is_no_normal_number_becomes_zero_and_zero_has_no_sign(native):
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (4, 1, 1))  # every code twice, each after the other
    scales = np.array([[0], [1], [2], [252]], np.uint8)
    expected = values_of(codes, scales)
    expected[np.abs(expected) < 2.0**-126] = 0
    assert np.count_nonzero(expected, axis=1).tolist() == [16, 24, 28, 28]
    for form in (native("pack_experts"), pack_experts):
        unpacked = unpack_experts(form(codes, PackedExperts.empty(1, 4, 32, MXFP4), 0, scales), 0)
        assert np.array_equal(unpacked, expected)
        assert not np.signbit(unpacked[unpacked == 0]).any()


def test_gate_and_up_of_neighbouring_rows(native):
    codes, scales = drawn_blocks(rng(5), 80, 2)
    into = PackedExperts.empty(2, 40, 64, MXFP4, gated=True)
    with threads(2):
        for half in range(2):
            native("pack_experts")(codes[half::2], into, 1, scales[half::2], half, 2)
    values = values_of(codes, scales)
    assert np.array_equal(unpack_experts(into, 1), np.stack([values[0::2], values[1::2]]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_floats_are_packed_as_by_pack_linear(native, kind):
    weight = draw(rng(6), (40, 33), kind)
    for form in (native("pack_experts"), pack_experts):
        into = PackedExperts.empty(2, 40, 33, kind)
        form(spaced_rows(weight), into, 1)
        assert np.array_equal(into.panels[1], native("pack_linear")(weight).panels)
        assert np.array_equal(unpack_experts(into, 1), unpack_linear(into.linear(1)))


def test_same_refusals(native):
    codes, scales = drawn_blocks(rng(7), 20, 2)
    into, floats = PackedExperts.empty(2, 20, 64, MXFP4), PackedExperts.empty(2, 20, 64, F32)
    weight = np.zeros((20, 64), np.float32)

    def refused(*args, error=ValueError, match):
        assert_same_refusal(native("pack_experts"), pack_experts, *args, error=error, match=match)

    refused(codes, into, 2, scales, match="expert is 2; into has 2")
    refused(codes, into, -1, scales, match="expert is -1")
    refused(codes, floats, 0, scales, match="into has dtype float32: it takes no scales")
    refused(weight, into, 0, match="into has dtype uint8: it takes scales")
    refused(weight, into, 0, scales, error=TypeError, match="weight has dtype float32; it must be uint8")
    refused(codes, into, 0, scales.astype(np.int16), error=TypeError, match="scales has dtype int16; it must be uint8")
    refused(codes[:, :1], into, 0, scales, match=r"weight has shape \(20, 1, 16\); it must be \(rows, 2, 16\)")
    refused(codes, into, 0, scales[:19], match=r"scales has shape \(19, 2\); it must be \(20, 2\)")
    refused(codes[..., ::-1], into, 0, scales, match="weight has strides")
    refused(codes, into, 0, scales, 1, match="2 panels from 1 in steps of 1 do not fit the 2 there are")
    refused(codes, PackedExperts(frozen(into.panels), 20, 64), 0, scales, match="into.panels is read-only")
    scales[3, 1] = 253
    refused(codes, into, 0, scales, match=r"scales holds 253; it must be at most 252 \(255 is NaN\)")
    weight[7, 7] = np.nan
    refused(weight, floats, 0, match="weight holds NaN")
    refused(misaligned(weight), floats, 0, match="weight is not aligned")


def test_panels_are_checked_against_the_features():
    panels = PackedExperts.empty(2, 33, 64, MXFP4).panels
    assert panels.shape == (2, 3, 2, 17, 16)
    for features, gated in (((32, 64), False), ((33, 96), False), ((33, 64), True)):
        with pytest.raises(ValueError, match=r"panels has shape \(2, 3, 2, 17, 16\); it must be \(experts, "):
            PackedExperts(panels, *features, gated)
    with pytest.raises(ValueError, match="in_features is 40; in MXFP4 it must be a multiple of 32"):
        PackedExperts.empty(1, 16, 40, MXFP4)
    with pytest.raises(TypeError, match="dtype is float16; it must be float32, bfloat16, or uint8 for MXFP4"):
        PackedExperts.empty(1, 16, 32, np.dtype(np.float16))
    with pytest.raises(ValueError, match="panels has strides"):
        PackedExperts(panels[::-1], 33, 64)
