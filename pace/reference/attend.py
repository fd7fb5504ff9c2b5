"""Causal attention of new tokens over the cache: grouped queries, paged keys and values, a ragged batch."""

import numpy as np

from .arrays import Array, Float, bfloat16, check_float, check_type, check_vector, check_writeable, f32
from .store_kv import GROUP, check_blocks, check_kv_heads


def attend(
    q: Array,
    k_blocks: Array,
    v_blocks: Array,
    block_tables: Array,
    query_starts: Array,
    kv_lengths: Array,
    scale: float,
    out: Array | None = None,
) -> Array:
    """y = softmax(scale · q · Kᵀ) · V, each query over the keys up to its own.

    q: (tokens, heads, head_dim), any token stride, heads contiguous: the new tokens of all sequences end to end;
    those of sequence s are query_starts[s] … query_starts[s+1]. Its keys and values, kv_lengths[s] of them, the new
    tokens' included and last, stand in blocks block_tables[s]. Head h reads the keys of head h // (heads / kv_heads).

    k_blocks, v_blocks: as store_kv writes them, of q's dtype. block_tables: (sequences, blocks) int32 C-contiguous.
    query_starts: (sequences + 1,) int32, from 0 to tokens. kv_lengths: (sequences,) int32. Returns (tokens, heads,
    head_dim) of q's dtype, C-contiguous, in `out` where it is given.

    Scores, softmax and sums in float32; with bfloat16, the softmax's numerators are rounded to bfloat16 before they
    multiply V (their sum is of the unrounded ones). One rounding, to q's dtype, at the end. The native form runs the
    softmax online (Milakov and Gimelshein, 2018), 64 keys at a time from the start of the sequence, and merges partial
    results of SPLIT keys in order (Dao et al., 2023): the same steps for one query or many, whatever the blocks.

    ValueError for shapes or lengths that do not fit each other, a block that does not exist, or a
    read-only `out`; TypeError for dtypes.
    """
    num_slots = check_blocks(k_blocks, v_blocks)
    check_kv_heads(q, "q", k_blocks)
    block_tokens = k_blocks.shape[2] * GROUP
    check_batch(len(q), block_tables, query_starts, kv_lengths, block_tokens, num_slots // block_tokens)
    if out is None:
        out = np.empty(q.shape, q.dtype)
    check_float(out, "out")
    if out.shape != q.shape or out.dtype != q.dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; it must be {q.shape}, {q.dtype}, contiguous"
        )
    check_writeable(out, "out")
    kv_heads = k_blocks.shape[1]
    for s, length in enumerate(kv_lengths):
        queries = slice(query_starts[s], query_starts[s + 1])
        count = queries.stop - queries.start
        if count == 0:
            continue
        keys, values = gather(k_blocks, v_blocks, block_tables[s], length)
        grouped = f32(q[queries]).reshape(count, kv_heads, -1, q.shape[2])
        scores = np.einsum("qhgd,khd->hgqk", grouped, keys) * np.float32(scale)
        own = np.arange(length - count, length)
        scores = np.where(np.arange(length) <= own[:, None], scores, -np.inf)
        numerators = np.exp(scores - scores.max(axis=-1, keepdims=True))
        sums = numerators.sum(axis=-1)
        if q.dtype == bfloat16:
            numerators = f32(numerators.astype(bfloat16))
        weighted = np.einsum("hgqk,khd->qhgd", numerators, values) / sums.transpose(2, 0, 1)[..., None]
        out[queries] = weighted.reshape(count, *q.shape[1:])
    return out


def check_batch(
    tokens: int, block_tables: Array, query_starts: Array, kv_lengths: Array, block_tokens: int, num_blocks: int
) -> None:
    sequences = len(kv_lengths)
    check_vector(kv_lengths, "kv_lengths", sequences, np.int32)
    check_vector(query_starts, "query_starts", sequences + 1, np.int32)
    check_type(block_tables, "block_tables", np.int32)
    if block_tables.ndim != 2 or len(block_tables) != sequences or not block_tables.flags.c_contiguous:
        raise ValueError(f"block_tables has shape {block_tables.shape}; it must be ({sequences}, blocks), contiguous")
    if query_starts[0] != 0 or query_starts[-1] != tokens:
        raise ValueError(f"query_starts is {query_starts[0]} … {query_starts[-1]}; it must be 0 … {tokens}")
    for s, length in enumerate(kv_lengths):
        count = query_starts[s + 1] - query_starts[s]
        if count < 0 or length < count:
            raise ValueError(f"sequence {s} has {count} queries and {length} keys; its keys include the queries'")
        used = -(-int(length) // block_tokens)
        if used > block_tables.shape[1]:
            raise ValueError(f"sequence {s} has {length} keys; its {block_tables.shape[1]} blocks hold fewer")
        for block in block_tables[s, :used]:
            if not 0 <= block < num_blocks:
                raise ValueError(f"sequence {s} names block {block}; there are {num_blocks}")


def gather(k_blocks: Array, v_blocks: Array, table: Array, length: int) -> tuple[Float, Float]:
    """Keys and values of one sequence, each (length, kv_heads, head_dim)."""
    k = f32(k_blocks[table[: -(-length // (k_blocks.shape[2] * GROUP))]])
    v = f32(v_blocks[table[: -(-length // (v_blocks.shape[2] * GROUP))]])
    kv_heads = k.shape[1]
    if k_blocks.dtype == bfloat16:
        k = k.transpose(0, 2, 4, 1, 3, 5)
        v = v.transpose(0, 2, 3, 5, 1, 4)
    else:
        k = k.transpose(0, 2, 4, 1, 3)
        v = v.transpose(0, 2, 3, 1, 4)
    head_dim = v.shape[-1]
    return k.reshape(-1, kv_heads, head_dim)[:length], v.reshape(-1, kv_heads, head_dim)[:length]
