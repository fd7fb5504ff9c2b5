"""Keys and values into the cache, in the layout that attention reads.

A block holds `block_tokens` tokens of every head, in groups of 16 tokens of a head:

    K, bfloat16   [group][head_dim/2][16][2]    as a packed weight: scores of 16 keys at once, no sums across lanes
    K, float32    [group][head_dim][16]
    V, bfloat16   [group][8][head_dim][2]       pairs of tokens: the weighted sum adds two tokens at once
    V, float32    [group][16][head_dim]

A slot is one token's place: block · block_tokens + offset in the block.
"""

import numpy as np

from .arrays import Array, bfloat16, check_float, check_vector, check_writeable

GROUP = 16


def kv_shapes(
    num_blocks: int, kv_heads: int, block_tokens: int, head_dim: int, dtype: np.dtype[np.generic]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the K and V blocks of one layer.

    ValueError for a head_dim that is odd, or a block that is no multiple of 16 tokens.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even")
    if block_tokens < GROUP or block_tokens % GROUP:
        raise ValueError(f"block_tokens is {block_tokens}; it must be a multiple of {GROUP}")
    lead = (num_blocks, kv_heads, block_tokens // GROUP)
    if dtype == bfloat16:
        return (*lead, head_dim // 2, GROUP, 2), (*lead, GROUP // 2, head_dim, 2)
    return (*lead, head_dim, GROUP), (*lead, GROUP, head_dim)


def store_kv(k: Array, v: Array, k_blocks: Array, v_blocks: Array, slots: Array) -> None:
    """Write each token's keys and values to its slot.

    k, v: (tokens, kv_heads, head_dim), any token stride, heads contiguous. k_blocks, v_blocks: as kv_shapes gives, of
    k's dtype; blocks, heads and groups at any strides that are multiples of 4 bytes, each group contiguous. slots:
    (tokens,) int64, all different.

    ValueError for a slot outside the blocks (before anything is written), another shape, or blocks that are read-only;
    TypeError for another dtype.
    """
    num_slots = check_blocks(k_blocks, v_blocks)
    check_writeable(k_blocks, "k_blocks")
    check_writeable(v_blocks, "v_blocks")
    check_kv_heads(k, "k", k_blocks)
    check_kv_heads(v, "v", k_blocks)
    if k.shape != v.shape:
        raise ValueError(f"v has shape {v.shape}; it must be {k.shape}, as k")
    check_vector(slots, "slots", len(k), np.int64)
    for slot in slots:
        if not 0 <= slot < num_slots:
            raise ValueError(f"slot {slot} is outside the {num_slots} there are")
    block, offset = np.divmod(slots, num_slots // max(len(k_blocks), 1))
    group, lane = np.divmod(offset, GROUP)
    if k.dtype == bfloat16:
        pairs = (*k.shape[:2], k.shape[2] // 2, 2)
        k_blocks[block, :, group, :, lane] = k.reshape(pairs)
        v_blocks[block, :, group, lane // 2, :, lane % 2] = v
    else:
        k_blocks[block, :, group, :, lane] = k
        v_blocks[block, :, group, lane] = v


def check_blocks(k_blocks: Array, v_blocks: Array) -> int:
    """How many slots the blocks have."""
    check_float(k_blocks, "k_blocks")
    check_float(v_blocks, "v_blocks")
    if v_blocks.dtype != k_blocks.dtype:
        raise TypeError(f"v_blocks has dtype {v_blocks.dtype}; it must be {k_blocks.dtype}, as k_blocks")
    ndim = 6 if k_blocks.dtype == bfloat16 else 5
    if k_blocks.ndim != ndim or v_blocks.ndim != ndim:
        raise ValueError(f"k_blocks has shape {k_blocks.shape}, v_blocks {v_blocks.shape}; see kv_shapes")
    num_blocks, kv_heads, groups = k_blocks.shape[:3]
    head_dim = k_blocks.shape[3] * (2 if k_blocks.dtype == bfloat16 else 1)
    some = min(kv_heads, groups, head_dim) > 0 and head_dim % 2 == 0
    shapes = k_blocks.shape, v_blocks.shape
    if not some or shapes != kv_shapes(num_blocks, kv_heads, groups * GROUP, head_dim, k_blocks.dtype):
        raise ValueError(f"k_blocks has shape {k_blocks.shape}, v_blocks {v_blocks.shape}; see kv_shapes")
    for blocks, name in ((k_blocks, "k_blocks"), (v_blocks, "v_blocks")):
        inner = np.cumprod([blocks.itemsize, *blocks.shape[:3:-1]])[::-1]
        if any(
            n > 1 and step != dense for n, step, dense in zip(blocks.shape[3:], blocks.strides[3:], inner, strict=True)
        ):
            raise ValueError(f"{name} has strides {blocks.strides}; each group of {GROUP} tokens must be contiguous")
        if any(n > 1 and step % 4 for n, step in zip(blocks.shape[:3], blocks.strides[:3], strict=True)):
            raise ValueError(f"{name} has strides {blocks.strides}; those of groups must be multiples of 4 bytes")
    return int(num_blocks * groups * GROUP)


def check_kv_heads(x: Array, name: str, k_blocks: Array) -> None:
    """(tokens, heads, head_dim) of the blocks' dtype and head_dim; kv_heads as theirs unless x is q."""
    check_float(x, name)
    if x.dtype != k_blocks.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {k_blocks.dtype}, as k_blocks")
    kv_heads = k_blocks.shape[1]
    head_dim = k_blocks.shape[3] * (2 if k_blocks.dtype == bfloat16 else 1)
    heads_fit = x.ndim == 3 and (
        x.shape[1] > 0 and x.shape[1] % kv_heads == 0 if name == "q" else x.shape[1] == kv_heads
    )
    if not heads_fit or x.shape[2] != head_dim:
        heads = f"a positive multiple of {kv_heads}" if name == "q" else kv_heads
        raise ValueError(f"{name} has shape {x.shape}; it must be (tokens, {heads}, {head_dim})")
    if x.size and x.strides[1:] != (head_dim * x.itemsize, x.itemsize):
        raise ValueError(f"{name} has strides {x.strides}; the heads of a token must be contiguous")
