import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.cache.memory import Memory
from pace.kernels import reference
from pace.reference.store_kv import GROUP, kv_shapes

from .arrays import (
    BF16,
    F32,
    KINDS,
    assert_close,
    assert_same_refusal,
    draw,
    frozen,
    misaligned,
    rng,
    swapped,
    threads,
)

attend, store_kv = reference("attend"), reference("store_kv")

# float32: exp within an ulp and sums of up to a thousand terms in another order. bfloat16: numerators are rounded to 8
# bits relative to another running maximum, and the result once more.
TOLERANCE = {F32: {"rtol": 2e-5, "atol": 2e-6}, BF16: {"rtol": 2**-6, "atol": 2**-7}}


def dense(shape, kind):
    return np.full(shape, np.nan, kind)


def head_major(shape, kind):
    """All blocks of a head end to end."""
    return dense((shape[1], shape[0], *shape[2:]), kind).swapaxes(0, 1)


def interleaved(shape, kind):
    """One of two layers, its other half between the blocks, as in the caches."""
    return dense((shape[0], 2, 2, *shape[1:]), kind)[:, 1, 0]


def apart(shape, kind):
    """The last block first, and the groups not at any power of two."""
    wide = dense((*shape[:3], math.prod(shape[3:]) + 6), kind)
    return wide[::-1, ..., :-6].reshape(shape)


LAYOUTS = [dense, head_major, interleaved, apart]


class Case:
    """Sequences with (queries, keys) each, their keys and values in shuffled blocks of a pool full of NaN."""

    def __init__(self, seed, sequences, heads=4, kv_heads=2, head_dim=64, kind=F32, block_tokens=32, layout=dense):
        self.rng = rng(seed)
        self.kind, self.block_tokens = kind, block_tokens
        self.counts, lengths = np.array(sequences).reshape(-1, 2).T
        blocks = -(-lengths // block_tokens)
        num_blocks = int(blocks.sum()) + 2
        order = self.rng.permutation(num_blocks)
        self.tables = np.full((len(lengths), max(int(blocks.max(initial=0)), 1)), -1, np.int32)
        for s, count in enumerate(blocks):
            self.tables[s, :count], order = order[:count], order[count:]
        self.unused = order[0]
        self.k_blocks, self.v_blocks = (
            layout(shape, kind) for shape in kv_shapes(num_blocks, kv_heads, block_tokens, head_dim, kind)
        )
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        self.lengths = lengths.astype(np.int32)
        self.k = [draw(self.rng, (n, kv_heads, head_dim), kind) for n in lengths]
        self.v = [draw(self.rng, (n, kv_heads, head_dim), kind) for n in lengths]
        self.store()
        self.q = draw(self.rng, (int(self.counts.sum()), heads, head_dim), kind)
        self.scale = head_dim**-0.5

    def store(self):
        for s, n in enumerate(self.lengths):
            store_kv(self.k[s], self.v[s], self.k_blocks, self.v_blocks, self.slots(s, np.arange(n)))

    def slots(self, sequence, positions):
        block, offset = np.divmod(positions, self.block_tokens)
        return self.tables[sequence, block].astype(np.int64) * self.block_tokens + offset

    def positions(self):
        """Of each token, in its sequence."""
        return np.concatenate([np.arange(n - count, n) for count, n in zip(self.counts, self.lengths, strict=True)])

    def spans(self, width):
        """Positions in runs of `width` see each other, as far as there are any; every third has no span."""
        own = self.positions()
        begin = own // width * width
        spans = np.stack([begin, np.minimum(begin + width, self.lengths.repeat(self.counts))], axis=1)
        spans[own % 3 == 1] = 3
        return spans.astype(np.int32)

    def arguments(self):
        return self.q, self.k_blocks, self.v_blocks, self.tables, self.starts, self.lengths, self.scale


MIXED = [(1, 1), (1, 64), (1, 65), (5, 5), (3, 700), (70, 70), (17, 130), (1, 513), (2, 1025)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (16, 1)])
def test_twins_agree(native, kind, heads, kv_heads, head_dim):
    case = Case(1, MIXED[: 9 if head_dim == 64 else 7], heads, kv_heads, head_dim, kind)
    assert_close(native("attend")(*case.arguments()), attend(*case.arguments()), **TOLERANCE[kind])


# A sink for each head of a group.
SINKS = np.array([0.0, -4.0, 5.0, -np.inf, 50.0], np.float32)

# Threads, and (queries, keys) of each sequence, for one kv head.
PATHS = {
    "one query": (1, [(1, 1), (1, 90)]),
    "few queries": (1, [(8, 90), (2, 33)]),
    "prefill": (1, [(70, 75)]),
    "ragged": (2, [(1, 1), (5, 5), (0, 40), (1, 65), (17, 40)]),
    "one query, divided keys": (3, [(1, 600)]),
    "ragged, divided keys": (3, [(1, 3), (2, 1100)]),
    # Of the first nine queries, which are an item, windows begin in two splits, and spans end in the next.
    "items across splits": (1, [(12, 1300), (12, 515)]),
}
SLOW = pytest.mark.native_speed


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("spans", [None, 8, "most"], ids="spans={}".format)
@pytest.mark.parametrize("softcap", [None, 1.5], ids="softcap={}".format)
@pytest.mark.parametrize("sinks", [None, 0.0, SINKS], ids=["no sinks", "sinks of 0", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 0.6, 10_000], ids="window={}".format)
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=SLOW if path == "items across splits" else ()) for path in PATHS]
)
def test_every_path_takes_all_of_it(native, path, window, sinks, softcap, spans, kind):
    """window: 0.6 of the longest sequence; spans of most of it: across steps, and splits where keys are divided."""
    count, sequences = PATHS[path]
    case = Case(7, sequences, len(SINKS), 1, 32, kind, 64)
    longest = int(case.lengths.max())
    seen = {
        "window": int(longest * window) if window == 0.6 else window,
        "sinks": np.zeros(len(SINKS), np.float32) if np.isscalar(sinks) else sinks,
        "softcap": softcap,
        "spans": spans and case.spans(longest * 7 // 8 if spans == "most" else spans),
    }
    with threads(count):
        actual = native("attend")(*case.arguments(), **seen)
    assert_close(actual, attend(*case.arguments(), **seen), **TOLERANCE[kind])


@settings(max_examples=30)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 16),
    head_dim=st.sampled_from([2, 6, 30, 32, 40, 64, 80, 96, 112, 128, 256]),
    block_tokens=st.sampled_from([16, 32, 48, 64, 128, 256]),
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(KINDS),
    window=st.none() | st.integers(1, 150),
    sinks=st.none() | st.lists(st.sampled_from([0.0, -3.0, 1.0, 4.0, -np.inf]), min_size=48, max_size=48),
    softcap=st.none() | st.sampled_from([0.5, 3.0, 50.0]),
    spans=st.none() | st.integers(1, 150),
    count=st.integers(1, 3),
)
def test_twins_agree_on_what_is_drawn(
    native, sequences, kv_heads, group, head_dim, block_tokens, layout, kind, window, sinks, softcap, spans, count
):
    heads = kv_heads * group
    most = 1 + 2**14 // (heads * head_dim)  # queries, for the sake of the emulated CPU
    sequences = [(min(queries, most), min(queries, most) + before) for queries, before in sequences]
    case = Case(2, sequences, heads, kv_heads, head_dim, kind, block_tokens, layout)
    seen = {
        "window": window,
        "sinks": sinks and np.array(sinks[:heads], np.float32),
        "softcap": softcap,
        "spans": spans and case.spans(spans),
    }
    with threads(count):
        actual = native("attend")(*case.arguments(), **seen)
    assert_close(actual, attend(*case.arguments(), **seen), **TOLERANCE[kind])


def sees(case, window, spans):
    """Of the first sequence: whether each query sees each key, one by one."""
    mask = np.zeros((case.counts[0], case.lengths[0]), bool)
    for i, own in enumerate(range(case.lengths[0] - case.counts[0], case.lengths[0])):
        for key in range(case.lengths[0]):
            near = key <= own and (window is None or key > own - window)
            mask[i, key] = near or (spans is not None and spans[i, 0] <= key < spans[i, 1])
    return mask


def softmax_of(scores, sinks):
    """Weights, (heads, queries, keys), with each head's sink as one key more; in float64, as the formula says it."""
    weights, rest = np.exp(scores), np.exp(sinks.astype(np.float64))[:, None, None]
    return weights / (weights.sum(axis=-1, keepdims=True) + rest)


shapes = {
    "count": st.integers(1, 20),
    "before": st.integers(0, 60),
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 4),
    "head_dim": st.sampled_from([2, 32, 80]),
    "layout": st.sampled_from(LAYOUTS),
    "window": st.none() | st.integers(1, 90),
    "spans": st.none() | st.integers(1, 90),
}
# The reference multiplies and sums in float32.
FORMULA = {"rtol": 1e-5, "atol": 2e-6}


@settings(max_examples=30)
@given(**shapes)
def test_reference_equals_torch(count, before, kv_heads, group, head_dim, layout, window, spans):
    torch = pytest.importorskip("torch")
    case = Case(3, [(count, count + before)], kv_heads * group, kv_heads, head_dim, layout=layout)
    spans = spans and case.spans(spans)
    q, k, v = (torch.from_numpy(x).double().transpose(0, 1) for x in (case.q, case.k[0], case.v[0]))
    mask = torch.from_numpy(sees(case, window, spans))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    actual = attend(*case.arguments(), window=window, spans=spans)
    np.testing.assert_allclose(actual, expected.transpose(0, 1).numpy(), **FORMULA)


@settings(max_examples=30)
@given(
    **shapes,
    sinks=st.lists(st.sampled_from([0.0, -3.0, 1.0, 4.0, -np.inf]), min_size=12, max_size=12),
    softcap=st.none() | st.floats(0.1, 100),
    scale=st.floats(0.01, 1),
)
def test_reference_equals_the_formula(
    count, before, kv_heads, group, head_dim, layout, window, spans, sinks, softcap, scale
):
    """With a sink and a cap, which torch has not."""
    case = Case(8, [(count, count + before)], kv_heads * group, kv_heads, head_dim, layout=layout)
    spans, sinks = spans and case.spans(spans), np.array(sinks[: kv_heads * group], np.float32)
    q, k, v = (x.astype(np.float64).swapaxes(0, 1) for x in (case.q, case.k[0], case.v[0]))
    scores = scale * q @ k.repeat(group, axis=0).swapaxes(1, 2)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    expected = softmax_of(np.where(sees(case, window, spans), scores, -np.inf), sinks) @ v.repeat(group, axis=0)
    *arguments, _ = case.arguments()
    actual = attend(*arguments, scale, window=window, sinks=sinks, softcap=softcap, spans=spans)
    np.testing.assert_allclose(actual, expected.swapaxes(0, 1), **FORMULA)


LIMITED = {"window": 90, "sinks": np.array([0.0, -1.0, 2.0, -np.inf], np.float32), "softcap": 2.0}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "limits"),
    [pytest.param(64, {}, marks=SLOW), pytest.param(40, {}, marks=SLOW), (64, LIMITED), (40, LIMITED)],
)
def test_bits_do_not_depend_on_batch_chunks_blocks_or_threads(native, kind, head_dim, limits):
    """One prompt whole, in chunks of 7, and a token at a time; in other blocks, among others, on other threads."""
    length = 600
    whole = Case(4, [(length, length)], head_dim=head_dim, kind=kind)
    with threads(1):
        expected = native("attend")(*whole.arguments(), **limits)
    for chunk, block_tokens, layout in [(7, 16, dense), (1, 64, interleaved), (64, 128, head_major), (37, 48, apart)]:
        case = Case(4, [(length, length)], head_dim=head_dim, kind=kind, block_tokens=block_tokens, layout=layout)
        case.k, case.v = whole.k, whole.v
        case.store()
        other = np.zeros((2, *whole.q.shape[1:]), kind)
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            if 100 < begin < 450:  # enough at both ends, and across the first split
                continue
            queries = np.concatenate([whole.q[begin:end], other])
            tables = np.concatenate([case.tables, case.tables])
            starts, lengths = np.array([0, end - begin, end - begin + 2], np.int32), np.array([end, 9], np.int32)
            with threads(1 + begin // chunk % 3):
                actual = native("attend")(
                    queries, case.k_blocks, case.v_blocks, tables, starts, lengths, case.scale, **limits
                )
            assert np.array_equal(actual[: end - begin], expected[begin:end]), (chunk, begin)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("limits", [{}, LIMITED], ids=["all", "limited"])
@pytest.mark.parametrize(("length", "before"), [(160, 0), (1120, 1056)])
def test_bits_of_chunks_that_hold_whole_spans(native, kind, limits, length, before):
    """In chunks of 32, spans of up to 32; with keys that are divided over threads, and one among them that is far."""
    whole = Case(9, [(length - before, length)], head_dim=32, kind=kind)
    spans = whole.spans(32)
    with threads(1):
        expected = native("attend")(*whole.arguments(), spans=spans, **limits)
    q, k, v, tables, _, _, scale = whole.arguments()
    for count in (1, 2, 3):
        for begin in range(before, length, 32):
            chunk = slice(begin - before, begin - before + 32)
            starts, lengths = np.array([0, 32], np.int32), np.array([begin + 32], np.int32)
            with threads(count):
                actual = native("attend")(q[chunk], k, v, tables, starts, lengths, scale, spans=spans[chunk], **limits)
            assert np.array_equal(actual, expected[chunk]), (count, begin)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("keys", [80, 1100])
def test_a_row_knows_nothing_of_others(native, count, kind, keys):
    """Of two queries beside each other, one stays as other queries, other sequences, and keys it can't see change."""
    sequences, seen = [(5, keys), (1, 70)], {**LIMITED, "window": keys - 40}
    case = Case(10, sequences, head_dim=32, kind=kind)
    with threads(count):
        expected = native("attend")(*case.arguments(), **seen)
        for stays in range(5):
            changed = Case(11, sequences, head_dim=32, kind=kind)
            own = keys - 5 + stays
            visible = slice(own + 1 - seen["window"], own + 1)
            changed.q[stays] = case.q[stays]
            changed.k[0][visible], changed.v[0][visible] = case.k[0][visible], case.v[0][visible]
            changed.store()
            actual = native("attend")(*changed.arguments(), **seen)
            assert np.array_equal(actual[stays], expected[stays])
            assert not np.isclose(actual[:5].astype(F32), expected[:5].astype(F32))[np.arange(5) != stays].all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("queries", "keys", "window"), [(1, 90, 20), (9, 200, 70), (1, 1200, 700), (5, 1100, 100)])
def test_what_nobody_sees_is_not_read(native, kind, layout, queries, keys, window):
    """NaN in the groups before the window, whose blocks may be any; after the last key a case has NaN anyway."""
    case = Case(12, [(queries, keys)], head_dim=32, kind=kind, block_tokens=32, layout=layout)
    expected = attend(*case.arguments(), window=window)
    begin = (keys - queries + 1 - window) // GROUP * GROUP  # of the first group of which a query sees some
    unseen = case.slots(0, np.arange(begin))
    nothing = np.full((begin, *case.k[0].shape[1:]), np.nan, kind)
    store_kv(nothing, nothing, case.k_blocks, case.v_blocks, unseen)
    case.tables[0, : begin // case.block_tokens] = case.unused
    assert np.array_equal(attend(*case.arguments(), window=window), expected)
    for count in (1, 3):
        with threads(count):
            actual = native("attend")(*case.arguments(), window=window)
        assert_close(actual, expected, **TOLERANCE[kind])


@SLOW
@pytest.mark.parametrize("block_tokens", [256, 1 << 17])
def test_128k_tokens_over_8_gib(native, block_tokens):
    """Blocks, and the groups of one block, so far apart that a pool spans more than 32 bits of bytes."""
    length, head_dim = 1 << 17, 32
    k_shape, v_shape = kv_shapes(length // block_tokens, 1, block_tokens, head_dim, BF16)
    pools = []
    memories = [Memory(8 << 30, huge_pages=False) for _ in range(2)]
    for memory, shape in zip(memories, (k_shape, v_shape), strict=True):
        group_bytes = (8 << 30) // (length // GROUP) if block_tokens == length else GROUP * head_dim * BF16.itemsize
        block_bytes = (8 << 30) // shape[0]
        inner = np.empty(shape[3:], BF16).strides
        strides = block_bytes, block_bytes, group_bytes, *inner
        pools.append(np.lib.stride_tricks.as_strided(memory.bytes.view(BF16), shape, strides))
    k, v = (draw(rng(13, i), (length, 1, head_dim), BF16) for i in range(2))
    table = rng(13).permutation(shape[0]).astype(np.int32)[None]
    slots = (table[0, :, None] * np.int64(block_tokens) + np.arange(block_tokens)).ravel()
    native("store_kv")(k, v, *pools, slots)
    q = draw(rng(14), (3, 4, head_dim), BF16)
    arguments = q, *pools, table, np.array([0, 3], np.int32), np.array([length], np.int32), 1.0
    for window in (None, 70_000):
        with threads(3):
            actual = native("attend")(*arguments, window=window)
        assert_close(actual, attend(*arguments, window=window), **TOLERANCE[BF16])


def test_strided_queries_and_out(native):
    case = Case(5, [(9, 30)])
    wide = np.full((9, 3, *case.q.shape[1:]), np.nan, np.float32)
    wide[:, 1] = case.q
    out = np.empty_like(case.q)
    q, *rest = case.arguments()
    assert native("attend")(wide[:, 1], *rest, out=out) is out
    assert np.array_equal(out, native("attend")(q, *rest))


@pytest.mark.parametrize("softcap", [2.0**-64, 2.0**64])
def test_the_least_and_the_largest_cap(native, softcap):
    case = Case(7, [(3, 70)])
    actual = native("attend")(*case.arguments(), softcap=softcap)
    assert_close(actual, attend(*case.arguments(), softcap=softcap), **TOLERANCE[F32])


def test_same_refusals(native):
    case = Case(6, [(2, 40), (1, 3)])
    q, k, v, tables, starts, lengths, scale = case.arguments()
    twins = native("attend"), attend

    def refused(*args, error=ValueError, match, **kwargs):
        assert_same_refusal(*twins, *args, error=error, match=match, **kwargs)

    refused(q.astype(BF16), k, v, tables, starts, lengths, scale, error=TypeError, match="q has dtype bfloat16")
    refused(q[:, :3], k, v, tables, starts, lengths, scale, match=r"q has shape \(3, 3, 64\)")
    refused(q, k, v[:1], tables, starts, lengths, scale, match="v_blocks")
    refused(q, k, v, tables, starts[:2], lengths, scale, match="query_starts has shape")
    refused(q, k, v, tables, starts + 1, lengths, scale, match="query_starts is 1 … 4")
    refused(q, k, v, tables, starts, np.array([1, 3], np.int32), scale, match="sequence 0 has 2 queries and 1 keys")
    refused(q, k, v, tables, starts, np.array([40, 99], np.int32), scale, match="sequence 1 has 99 keys")
    refused(q, k, v, tables + 99, starts, lengths, scale, match="names block")
    refused(
        q, k, v, tables.astype(np.int64), starts, lengths, scale, error=TypeError, match="block_tables has dtype int64"
    )
    rest = starts, lengths, scale
    refused(q[:, :0], k, v, tables, *rest, match=r"q has shape \(3, 0, 64\); it must be \(tokens, a positive multiple")
    for axis in (1, 2):
        refused(q, k.take([], axis), v.take([], axis), tables, *rest, match="see kv_shapes")
    refused(swapped(q), k, v, tables, *rest, error=TypeError, match="q has dtype >f4; it must be float32")
    refused(misaligned(q), k, v, tables, *rest, match="q is not aligned")
    refused(q, k, v, swapped(tables), *rest, error=TypeError, match="block_tables has dtype >i4; it must be int32")
    refused(q, k, v, misaligned(tables), *rest, match="block_tables is not aligned")
    refused(q, k, v, tables, *rest, out=frozen(q), match="out is read-only")
    refused(q, k, v, tables, *rest, out=misaligned(q), match="out is not aligned")
    refused(q, k, v, tables, *rest, out=swapped(q), error=TypeError, match="out has dtype >f4")
    refused(q, k, v, tables, *rest, out=q[:2], match=r"out has shape \(2, 4, 64\)")


def test_same_refusals_of_what_is_seen(native):
    case = Case(6, [(2, 40), (1, 3)])
    spans = case.spans(8)
    twins = native("attend"), attend

    def refused(error=ValueError, *, match, **kwargs):
        assert_same_refusal(*twins, *case.arguments(), error=error, match=match, **kwargs)

    for window in (0, -1):
        refused(window=window, match=f"window is {window}; it must be at least 1, or None")
    for softcap in (0, 0.0, -1, 1e-50, 1e50, np.inf, -np.inf, np.nan):
        refused(softcap=softcap, match=re.escape(f"softcap is {softcap}; it must be 2^-64 to 2^64, or None"))
    sinks = np.zeros(4, np.float32)
    refused(sinks=sinks[:3], match=r"sinks has shape \(3,\); it must be \(4,\)")
    refused(sinks=sinks[None], match=r"sinks has shape \(1, 4\); it must be \(4,\)")
    refused(sinks=np.zeros(8, np.float32)[::2], match=r"sinks has strides \(8,\); it must be contiguous")
    refused(TypeError, sinks=sinks.astype(np.float64), match="sinks has dtype float64; it must be float32")
    refused(TypeError, sinks=sinks.astype(BF16), match="sinks has dtype bfloat16; it must be float32")
    refused(TypeError, sinks=swapped(sinks), match="sinks has dtype >f4; it must be float32")
    refused(sinks=misaligned(sinks), match="sinks is not aligned")
    refused(spans=spans[:2], match=r"spans has shape \(2, 2\); it must be \(3, 2\), contiguous")
    refused(spans=spans.ravel(), match=r"spans has shape \(6,\); it must be \(3, 2\), contiguous")
    refused(spans=spans.T.copy(), match=r"spans has shape \(2, 3\); it must be \(3, 2\), contiguous")
    refused(spans=np.asfortranarray(spans), match=r"spans has shape \(3, 2\); it must be \(3, 2\), contiguous")
    refused(TypeError, spans=spans.astype(np.int64), match="spans has dtype int64; it must be int32")
    refused(TypeError, spans=swapped(spans), match="spans has dtype >i4; it must be int32")
    refused(spans=misaligned(spans), match="spans is not aligned")
    for token, begin, end, own, length in [
        (0, 39, 40, 38, 40),  # behind it
        (0, 30, 38, 38, 40),  # before it
        (0, -1, 39, 38, 40),  # from before the sequence
        (1, 30, 41, 39, 40),  # to beyond it
        (1, 40, 30, 39, 40),  # backwards
        (2, 0, 4, 2, 3),
    ]:
        wrong = spans.copy()
        wrong[token] = begin, end
        refused(spans=wrong, match=f"token {token}, at position {own} of {length}, has the span {begin} … {end}")
    for form in twins:  # no span, wherever it is said to be
        spans[:] = [[-5, -5], [99, 99], [1, 1]]
        assert_close(form(*case.arguments(), spans=spans), attend(*case.arguments()), **TOLERANCE[F32])
