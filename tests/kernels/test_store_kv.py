import numpy as np
import pytest

from pace.kernels import reference
from pace.reference.attend import gather
from pace.reference.store_kv import kv_shapes

from .arrays import BF16, F32, KINDS, assert_same_refusal, draw, frozen, misaligned, rng, swapped, threads

store_kv = reference("store_kv")


def case(kind, head_dim=6, tokens=30):
    generator = rng(head_dim, tokens)
    shapes = kv_shapes(5, 3, 32, head_dim, kind)
    k, v = draw(generator, (tokens, 3, head_dim), kind), draw(generator, (tokens, 3, head_dim), kind)
    slots = generator.permutation(160)[:tokens].astype(np.int64)
    return k, v, *(np.full(shape, 7, kind) for shape in shapes), slots


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("head_dim", [2, 16, 64, 80])
def test_twins_write_the_same_bits_to_their_slots_only(native, kind, head_dim):
    k, v, k_blocks, v_blocks, slots = case(kind, head_dim)
    twin_k, twin_v = k_blocks.copy(), v_blocks.copy()
    with threads(2):
        native("store_kv")(k, v, k_blocks, v_blocks, slots)
    store_kv(k, v, twin_k, twin_v, slots)
    assert np.array_equal(k_blocks, twin_k)
    assert np.array_equal(v_blocks, twin_v)
    keys, values = gather(k_blocks, v_blocks, np.arange(5), np.arange(160))
    assert np.array_equal(keys[slots], k.astype(np.float32))
    assert np.array_equal(values[slots], v.astype(np.float32))
    assert (np.delete(keys, slots, axis=0) == 7).all()


def test_takes_views_into_a_fused_projection(native):
    k, v, k_blocks, v_blocks, slots = case(BF16)
    fused = np.concatenate([k, v], axis=1)
    native("store_kv")(fused[:, :3], fused[:, 3:], k_blocks, v_blocks, slots)
    keys, values = gather(k_blocks, v_blocks, np.arange(5), np.arange(160))
    assert np.array_equal(keys[slots], k.astype(np.float32))
    assert np.array_equal(values[slots], v.astype(np.float32))


def test_long_long_slots_and_no_token(native):
    k, v, k_blocks, v_blocks, slots = case(F32)
    native("store_kv")(k, v, k_blocks, v_blocks, slots.astype(np.longlong))
    keys, _ = gather(k_blocks, v_blocks, np.arange(5), np.arange(160))
    assert np.array_equal(keys[slots], k)
    for form in (native("store_kv"), store_kv):
        form(k[:0], v[:0], k_blocks[:0], v_blocks[:0], slots[:0])


def test_same_refusals(native):
    k, v, k_blocks, v_blocks, slots = case(BF16)

    def refused(*args, error=ValueError, match):
        assert_same_refusal(native("store_kv"), store_kv, *args, error=error, match=match)

    refused(k, v[1:], k_blocks, v_blocks, slots, match="v has shape")
    refused(k[:, :2], v, k_blocks, v_blocks, slots, match="k has shape")
    refused(k.astype(np.float32), v, k_blocks, v_blocks, slots, error=TypeError, match="k has dtype float32")
    refused(k, v, k_blocks, v_blocks, slots.astype(np.int32), error=TypeError, match="slots has dtype int32")
    refused(k, v, k_blocks, v_blocks, slots + 160, match="outside the 160 there are")
    refused(k, v, k_blocks[1:], v_blocks, slots, match="see kv_shapes")
    refused(k, v, frozen(k_blocks), v_blocks, slots, match="k_blocks is read-only")
    refused(k, v, k_blocks, frozen(v_blocks), slots, match="v_blocks is read-only")
    refused(misaligned(k), v, k_blocks, v_blocks, slots, match="k is not aligned")
    refused(k, v, k_blocks, misaligned(v_blocks), slots, match="v_blocks is not aligned")
    refused(k, v, k_blocks, v_blocks, misaligned(slots), match="slots is not aligned")
    refused(k, v, k_blocks, v_blocks, swapped(slots), error=TypeError, match="slots has dtype >i8; it must be int64")
    turned = np.ascontiguousarray(k_blocks.swapaxes(3, 4)).swapaxes(3, 4)
    refused(k, v, turned, v_blocks, slots, match=r"k_blocks has strides .*; each group of 16 tokens must be contiguous")
    wide = np.zeros((*v_blocks.shape[:3], v_blocks[0, 0, 0].size + 1), BF16)
    uneven = wide[..., :-1].reshape(v_blocks.shape)
    refused(k, v, k_blocks, uneven, slots, match=r"v_blocks has strides .*; those of groups must be multiples of 4")
    for axis in (1, 2, 3):
        empty = k_blocks.take([], axis), v_blocks.take([], axis if axis < 3 else 4)
        refused(k, v, *empty, slots, match="see kv_shapes")
    with pytest.raises(ValueError, match="block_tokens is 24"):
        kv_shapes(1, 1, 24, 64, BF16)
    with pytest.raises(ValueError, match="head_dim is 5"):
        kv_shapes(1, 1, 32, 5, BF16)
