import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kernels import reference
from pace.reference.store_kv import kv_shapes

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


class Case:
    """Sequences with (queries, keys) each, their keys and values in shuffled blocks of a pool full of garbage."""

    def __init__(self, seed, sequences, heads=4, kv_heads=2, head_dim=64, kind=F32, block_tokens=32):
        self.rng = rng(seed)
        self.kind, self.block_tokens = kind, block_tokens
        counts, lengths = np.array(sequences).reshape(-1, 2).T
        blocks = -(-lengths // block_tokens)
        num_blocks = int(blocks.sum()) + 2
        order = self.rng.permutation(num_blocks)
        self.tables = np.full((len(lengths), max(int(blocks.max(initial=0)), 1)), -1, np.int32)
        for s, count in enumerate(blocks):
            self.tables[s, :count], order = order[:count], order[count:]
        k_shape, v_shape = kv_shapes(num_blocks, kv_heads, block_tokens, head_dim, kind)
        self.k_blocks, self.v_blocks = np.full(k_shape, np.nan, kind), np.full(v_shape, np.nan, kind)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.lengths = lengths.astype(np.int32)
        self.k = [draw(self.rng, (n, kv_heads, head_dim), kind) for n in lengths]
        self.v = [draw(self.rng, (n, kv_heads, head_dim), kind) for n in lengths]
        for s, n in enumerate(lengths):
            store_kv(self.k[s], self.v[s], self.k_blocks, self.v_blocks, self.slots(s, np.arange(n)))
        self.q = draw(self.rng, (int(counts.sum()), heads, head_dim), kind)
        self.scale = head_dim**-0.5

    def slots(self, sequence, positions):
        block, offset = np.divmod(positions, self.block_tokens)
        return self.tables[sequence, block].astype(np.int64) * self.block_tokens + offset

    def arguments(self):
        return self.q, self.k_blocks, self.v_blocks, self.tables, self.starts, self.lengths, self.scale


MIXED = [(1, 1), (1, 64), (1, 65), (5, 5), (3, 700), (70, 70), (17, 130), (1, 513), (2, 1025)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (16, 1)])
def test_twins_agree(native, kind, heads, kv_heads, head_dim):
    case = Case(1, MIXED[: 9 if head_dim == 64 else 7], heads, kv_heads, head_dim, kind)
    assert_close(native("attend")(*case.arguments()), attend(*case.arguments()), **TOLERANCE[kind])


@settings(max_examples=25)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 16),
    head_dim=st.sampled_from([2, 6, 16, 30, 40, 64]),
    block_tokens=st.sampled_from([16, 48, 64, 128]),
    kind=st.sampled_from(KINDS),
)
def test_twins_agree_on_drawn_shapes(native, sequences, kv_heads, group, head_dim, block_tokens, kind):
    ragged = [(queries, queries + before) for queries, before in sequences]
    case = Case(2, ragged, kv_heads * group, kv_heads, head_dim, kind, block_tokens)
    assert_close(native("attend")(*case.arguments()), attend(*case.arguments()), **TOLERANCE[kind])


def test_reference_equals_torch():
    torch = pytest.importorskip("torch")
    case = Case(3, [(20, 50)], heads=6, kv_heads=2)
    q, k, v = (torch.from_numpy(x).double().transpose(0, 1) for x in (case.q, case.k[0], case.v[0]))
    mask = torch.arange(50) <= torch.arange(30, 50)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    np.testing.assert_allclose(attend(*case.arguments()), expected.transpose(0, 1).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("head_dim", [pytest.param(64, marks=pytest.mark.native_speed), 40])
def test_bits_do_not_depend_on_batch_chunks_blocks_or_threads(native, kind, head_dim):
    """One prompt whole, in chunks of 7, and a token at a time; in other blocks, among others, on other threads."""
    length = 600
    whole = Case(4, [(length, length)], head_dim=head_dim, kind=kind)
    with threads(1):
        expected = native("attend")(*whole.arguments())
    for chunk, block_tokens in [(7, 16), (1, 64), (64, 128)]:
        case = Case(4, [(length, length)], head_dim=head_dim, kind=kind, block_tokens=block_tokens)
        case.k, case.v = whole.k, whole.v
        store_kv(case.k[0], case.v[0], case.k_blocks, case.v_blocks, case.slots(0, np.arange(length)))
        other = np.zeros((2, *whole.q.shape[1:]), kind)
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            if 100 < begin < 450:  # enough at both ends, and across the first split
                continue
            queries = np.concatenate([whole.q[begin:end], other])
            tables = np.concatenate([case.tables, case.tables])
            starts = np.array([0, end - begin, end - begin + 2], np.int32)
            with threads(3):
                actual = native("attend")(
                    queries, case.k_blocks, case.v_blocks, tables, starts, np.array([end, 9], np.int32), case.scale
                )
            assert np.array_equal(actual[: end - begin], expected[begin:end]), (chunk, begin)


def test_strided_queries_and_out(native):
    case = Case(5, [(9, 30)])
    wide = np.full((9, 3, *case.q.shape[1:]), np.nan, np.float32)
    wide[:, 1] = case.q
    out = np.empty_like(case.q)
    q, *rest = case.arguments()
    assert native("attend")(wide[:, 1], *rest, out=out) is out
    assert np.array_equal(out, native("attend")(q, *rest))


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
