"""Attention of new tokens over the cache: grouped queries, paged keys and values, a ragged batch."""

from collections.abc import Iterator
from operator import index

import numpy as np

from .arrays import Array, Float, bfloat16, check_float, check_type, check_vector, check_writeable, f32, float32
from .masks import MaskCache
from .store_kv import GROUP, check_blocks, check_kv_heads

MASKS = MaskCache(max_bytes=64 << 20)


def attend(
    q: Array,
    k_blocks: Array,
    v_blocks: Array,
    block_tables: Array,
    query_starts: Array,
    kv_lengths: Array,
    scale: float,
    window: int | None = None,
    sinks: Array | None = None,
    softcap: float | None = None,
    spans: Array | None = None,
    out: Array | None = None,
) -> Array:
    """y = softmax(scale · q · Kᵀ) · V, each query over the keys that it sees.

    q: (tokens, heads, head_dim), any token stride, heads contiguous: the new tokens of all sequences end to end;
    those of sequence s are query_starts[s] … query_starts[s+1]. Its keys and values, kv_lengths[s] of them, the new
    tokens' included and last, stand in blocks block_tables[s]. Head h reads the keys of head h // (heads / kv_heads).

    A query sees the keys up to its own. window: of those, only the last `window`, its own included (Beltagy et al.,
    2020). spans: (tokens, 2) int32, the positions [begin, end) in the token's sequence that it sees besides, before
    and behind it, as those of one image do (begin == end for none). softcap: scores s become
    softcap · tanh(s / softcap) (Gemma 2, 2024). sinks: (heads,) float32, the score of a key more, that has no value
    (Xiao et al., 2023, as in GPT-OSS): it takes its part of the softmax.

    k_blocks, v_blocks: as store_kv writes them, of q's dtype; groups of 16 tokens of which none is seen are not read,
    nor is what lies past a sequence's end. block_tables: (sequences, blocks) int32 C-contiguous. query_starts:
    (sequences + 1,) int32, from 0 to tokens. kv_lengths: (sequences,) int32. Returns (tokens, heads, head_dim) of q's
    dtype, C-contiguous, in `out` where it is given: q itself, or memory apart from q's.

    Scores, softmax and sums in float32; with bfloat16, the softmax's numerators are rounded to bfloat16 before they
    multiply V (their sum is of the unrounded ones). One rounding, to q's dtype, at the end. The native form runs the
    softmax online (Milakov and Gimelshein, 2018), 64 keys at a time from the start of the sequence, merges partial
    results of 512 keys in order (Dao et al., 2023), and takes the sink last: the same steps for one query or many,
    whatever the blocks. Where V holds an infinity or NaN, it may reach queries of the same call that do not see it.

    ValueError for shapes or lengths that do not fit each other, a block that does not exist, a window below 1, a
    softcap outside 2^-64 to 2^64, a span that lies outside its sequence or does not hold its token, or a read-only
    `out`; TypeError for dtypes.
    """
    check_attend(q, k_blocks, v_blocks, block_tables, query_starts, kv_lengths, window, sinks, softcap, spans, out)
    if out is None:
        out = np.empty(q.shape, q.dtype)
    for queries, keys, values, mask in gathered(
        k_blocks, v_blocks, block_tables, query_starts, kv_lengths, window, spans
    ):
        out[queries] = attend_one(q[queries], keys, values, mask, scale, sinks, softcap)
    return out


def check_attend(
    q: Array,
    k_blocks: Array,
    v_blocks: Array,
    block_tables: Array,
    query_starts: Array,
    kv_lengths: Array,
    window: int | None,
    sinks: Array | None,
    softcap: float | None,
    spans: Array | None,
    out: Array | None,
) -> None:
    num_slots = check_blocks(k_blocks, v_blocks)
    check_kv_heads(q, "q", k_blocks)
    block_tokens = k_blocks.shape[2] * GROUP
    check_batch(len(q), block_tables, query_starts, kv_lengths, block_tokens, num_slots // block_tokens)
    check_what_is_seen(q, query_starts, kv_lengths, window, sinks, softcap, spans)
    if out is None:
        return
    check_float(out, "out")
    if out.shape != q.shape or out.dtype != q.dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; it must be {q.shape}, {q.dtype}, contiguous"
        )
    check_writeable(out, "out")


def gathered(
    k_blocks: Array,
    v_blocks: Array,
    block_tables: Array,
    query_starts: Array,
    kv_lengths: Array,
    window: int | None,
    spans: Array | None,
) -> Iterator[tuple[slice, Float, Float, Array]]:
    """Of each sequence that has queries: which they are; keys and values that any of them sees, (seen, kv_heads,
    head_dim); and which of these each sees, (count, seen).
    """
    for s, length in enumerate(kv_lengths.tolist()):
        queries = slice(int(query_starts[s]), int(query_starts[s + 1]))
        count = queries.stop - queries.start
        if count == 0:
            continue
        span = None if spans is None else spans[queries]
        with MASKS.mask(length - count, count, length, window, span) as mask:
            seen = np.flatnonzero(mask.any(axis=0))
            keys, values = gather(k_blocks, v_blocks, block_tables[s], seen)
            yield queries, keys, values, mask[:, seen]


def attend_one(
    q: Array, keys: Float, values: Float, mask: Array, scale: float, sinks: Array | None, softcap: float | None
) -> Array:
    """Of one sequence: q (count, heads, head_dim); keys, values (seen, kv_heads, head_dim); mask (count, seen)."""
    grouped = f32(q).reshape(len(q), keys.shape[1], -1, q.shape[2])
    scores = np.einsum("qhgd,khd->hgqk", grouped, keys) * np.float32(scale)
    if softcap is not None:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    scores = np.where(mask, scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True)
    sink = np.full(q.shape[1], -np.inf, float32) if sinks is None else sinks
    sink = sink.reshape(*scores.shape[:2], 1)
    largest = np.maximum(largest, sink[..., None])
    numerators = np.exp(scores - largest)
    sums = numerators.sum(axis=-1) + np.exp(sink - largest[..., 0])
    if q.dtype == bfloat16:
        numerators = f32(numerators.astype(bfloat16))
    weighted: Array = np.einsum("hgqk,khd->qhgd", numerators, values) / sums.transpose(2, 0, 1)[..., None]
    return weighted.reshape(q.shape)


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


def check_what_is_seen(
    q: Array,
    query_starts: Array,
    kv_lengths: Array,
    window: int | None,
    sinks: Array | None,
    softcap: float | None,
    spans: Array | None,
) -> None:
    if window is not None and index(window) < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None")
    if softcap is not None and not 2.0**-64 <= softcap <= 2.0**64:
        raise ValueError(f"softcap is {softcap}; it must be 2^-64 to 2^64, or None")
    if sinks is not None:
        check_vector(sinks, "sinks", q.shape[1], float32)
    if spans is None:
        return
    check_type(spans, "spans", np.int32)
    if spans.shape != (len(q), 2) or not spans.flags.c_contiguous:
        raise ValueError(f"spans has shape {spans.shape}; it must be ({len(q)}, 2), contiguous")
    for s, length in enumerate(kv_lengths):
        for token in range(query_starts[s], query_starts[s + 1]):
            begin, end = spans[token]
            own = length - query_starts[s + 1] + token
            if begin != end and not 0 <= begin <= own < end <= length:
                raise ValueError(
                    f"token {token}, at position {own} of {length}, has the span {begin} … {end}; "
                    "it must hold the token and lie within its sequence's keys"
                )


def gather(k_blocks: Array, v_blocks: Array, table: Array, positions: Array) -> tuple[Float, Float]:
    """Keys and values of one sequence's tokens, each (positions, kv_heads, head_dim), as store_kv put them there."""
    index, offset = np.divmod(positions, k_blocks.shape[2] * GROUP)
    block, (group, lane) = table[index], np.divmod(offset, GROUP)
    k = k_blocks[block, :, group, :, lane]
    if k_blocks.dtype == bfloat16:
        return f32(k.reshape(*k.shape[:2], -1)), f32(v_blocks[block, :, group, lane // 2, :, lane % 2])
    return f32(k), f32(v_blocks[block, :, group, lane])
