"""One suite over every cache: a random life of many sequences, against plain lists of keys and values."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from pace.cache import CACHES, CacheShape
from pace.cache.base import CacheFull
from pace.cache.slab_pool import block_tokens_for
from pace.ops import OperatorConfig
from tests.kernels.arrays import BF16, F32, KINDS

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 2, 2, 3, 8
SCALE = 0.3
BLOCK_TOKENS = [16, 32, 48]
# As in tests/kernels/test_attend.py.
TOLERANCE = {F32: {"rtol": 2e-5, "atol": 2e-6}, BF16: {"rtol": 2**-6, "atol": 2**-6}}


def shape(kind=F32, layers=LAYERS):
    return CacheShape(layers, KV_HEADS, HEAD_DIM, kind)


def make(name, kind=F32, block_tokens=16, blocks=6):
    capacity = blocks * block_tokens * shape(kind).bytes_per_token
    return CACHES[name](shape(kind), capacity, OperatorConfig(), block_tokens)


def attended(q, keys, values):
    """Causal attention of the last len(q) tokens, in float64. keys, values: (tokens, kv_heads, head_dim)."""
    q, keys, values = (array.astype(np.float64) for array in (q, keys, values))
    first = len(keys) - len(q)
    out = np.empty_like(q)
    for i, query in enumerate(q):
        for head in range(q.shape[1]):
            seen = slice(0, first + i + 1)
            scores = SCALE * keys[seen, head // GROUP] @ query[head]
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ values[seen, head // GROUP]
    return out


class Life(RuleBasedStateMachine):
    """The model: for each sequence, what was written in each layer, (layers, 2, tokens, kv_heads, head_dim)."""

    name: str
    kind: np.dtype
    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.written = {}

    @initialize(block_tokens=st.sampled_from(BLOCK_TOKENS), blocks=st.integers(1, 6))
    def begin(self, block_tokens, blocks):
        self.cache = make(self.name, self.kind, block_tokens, blocks)

    def draw(self, *shape):
        return self.rng.standard_normal(shape).astype(self.kind)

    @rule(target=sequences)
    def allocate(self):
        sequence = self.cache.allocate()
        assert sequence not in self.written
        self.written[sequence] = np.empty((LAYERS, 2, 0, KV_HEADS, HEAD_DIM), self.kind)
        return sequence

    @rule(chosen=st.lists(st.tuples(sequences, st.integers(0, 40)), max_size=4, unique_by=lambda pair: pair[0]))
    def append(self, chosen):
        ids, counts = [sequence for sequence, _ in chosen], [count for _, count in chosen]
        before = self.cache.stats()
        try:
            placement = self.cache.append(ids, counts)
        except CacheFull:
            assert self.cache.stats() == before  # all or nothing
            held = sum(self.cache.tokens_needed(self.length(s)) for s in self.written)
            grown = sum(
                self.cache.tokens_needed(self.length(s) + n) - self.cache.tokens_needed(self.length(s))
                for s, n in chosen
            )
            assert held + grown > before.capacity_tokens
            return
        assert placement.starts.tolist() == [0, *np.cumsum(counts)]
        assert placement.lengths.tolist() == [self.length(s) + n for s, n in chosen]
        positions = [position for s, n in chosen for position in range(self.length(s), self.length(s) + n)]
        assert placement.positions.tolist() == positions
        new = []
        for layer in range(LAYERS):
            q = self.draw(sum(counts), KV_HEADS * GROUP, HEAD_DIM)
            k, v = self.draw(sum(counts), KV_HEADS, HEAD_DIM), self.draw(sum(counts), KV_HEADS, HEAD_DIM)
            self.check(layer, chosen, q, k, v, self.cache.attend(layer, q, k, v, placement, SCALE))
            new.append((k, v))
        for i, (sequence, _) in enumerate(chosen):
            added = np.array(new)[:, :, placement.starts[i] : placement.starts[i + 1]]
            self.written[sequence] = np.concatenate([self.written[sequence], added], axis=2)

    def check(self, layer, chosen, q, k, v, actual):
        assert actual.shape == q.shape
        start = 0
        for sequence, count in chosen:
            new = slice(start, start + count)
            keys, values = self.written[sequence][layer]
            expected = attended(q[new], np.concatenate([keys, k[new]]), np.concatenate([values, v[new]]))
            np.testing.assert_allclose(actual[new].astype(np.float64), expected, **TOLERANCE[self.kind])
            start += count

    @rule(sequence=sequences, keep=st.floats(0, 1))
    def truncate(self, sequence, keep):
        length = int(keep * self.length(sequence))
        self.cache.truncate(sequence, length)
        self.written[sequence] = self.written[sequence][:, :, :length]

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        before = self.cache.stats()
        try:
            fork = self.cache.fork(sequence)
        except CacheFull:
            assert self.cache.stats() == before
            return multiple()
        assert fork not in self.written
        self.written[fork] = self.written[sequence]
        return fork

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        del self.written[sequence]

    def length(self, sequence):
        return self.written[sequence].shape[2]

    @invariant()
    def lengths_and_room(self):
        stats = self.cache.stats()
        assert stats.used_tokens == sum(map(self.length, self.written))
        assert all(self.cache.length(sequence) == self.length(sequence) for sequence in self.written)
        assert stats.used_tokens * shape(self.kind).bytes_per_token <= stats.used_bytes <= stats.capacity_bytes

    def teardown(self):
        for sequence in self.written:
            self.cache.free(sequence)
        stats = self.cache.stats()
        assert (stats.used_tokens, stats.used_bytes) == (0, 0)
        everything = self.cache.allocate()  # nothing leaked: it can all be had again
        self.cache.append([everything], [stats.capacity_tokens])
        with pytest.raises(CacheFull):
            self.cache.append([everything], [1])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", CACHES)
def test_a_random_life(name, kind):
    machine = type("Machine", (Life,), {"name": name, "kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))


@pytest.fixture(params=CACHES)
def name(request):
    return request.param


def test_a_full_cache_changes_nothing(name):
    cache = make(name, blocks=3)
    first, second = cache.allocate(), cache.allocate()
    placement = cache.append([first], [20])
    k, q = np.ones((20, KV_HEADS, HEAD_DIM), np.float32), np.ones((20, KV_HEADS * GROUP, HEAD_DIM), np.float32)
    before = [cache.attend(layer, q, k, k, placement, SCALE) for layer in range(LAYERS)]
    for sequences, counts in (([first], [40]), ([first, second], [5, 17]), ([second, first], [17, 1])):
        with pytest.raises(CacheFull, match="needed"):
            cache.append(sequences, counts)
    assert (cache.length(first), cache.length(second)) == (20, 0)
    again = [cache.attend(layer, q, k, k, placement, SCALE) for layer in range(LAYERS)]
    assert np.array_equal(before, again)
    cache.append([first, second], [12, 16])


def test_a_fork_is_of_its_own(name):
    cache = make(name)
    rng = np.random.default_rng(0)
    first = cache.allocate()
    written = rng.standard_normal((2, 20, KV_HEADS, HEAD_DIM)).astype(np.float32)
    q = rng.standard_normal((20, KV_HEADS * GROUP, HEAD_DIM)).astype(np.float32)
    cache.attend(0, q, *written, cache.append([first], [20]), SCALE)
    fork = cache.fork(first)
    one = rng.standard_normal((2, 1, KV_HEADS, HEAD_DIM)).astype(np.float32)
    other = one + 1
    outs = []
    for sequence, new in ((first, one), (fork, other)):
        cache.attend(0, q[:1], *new, cache.append([sequence], [1]), SCALE)
    for sequence, new in ((first, one), (fork, other)):
        # The same token written once more, so that what is attended is read after both have written.
        cache.truncate(sequence, 20)
        out = cache.attend(0, q[:1], *new, cache.append([sequence], [1]), SCALE)
        keys, values = np.concatenate([written, new], axis=1)
        np.testing.assert_allclose(out, attended(q[:1], keys, values), **TOLERANCE[F32])
        outs.append(out)
    assert not np.allclose(*outs)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blocks_do_not_change_the_numbers(name, rung, kind):
    rng = np.random.default_rng(0)
    tokens = 300
    q = rng.standard_normal((tokens, KV_HEADS * GROUP, HEAD_DIM)).astype(kind)
    k, v = rng.standard_normal((2, tokens, KV_HEADS, HEAD_DIM)).astype(kind)
    outs = []
    for block_tokens in (16, 48, 64, 256):
        cache = make(name, kind, block_tokens, blocks=40)
        sequence = cache.allocate()
        outs.append(cache.attend(1, q, k, v, cache.append([sequence], [tokens]), SCALE))
        cache.truncate(sequence, 7)
        for start in (7, 8, 100):
            stop = {7: 8, 8: 100, 100: 300}[start]
            part = slice(start, stop)
            out = cache.attend(1, q[part], k[part], v[part], cache.append([sequence], [stop - start]), SCALE)
            assert np.array_equal(out, outs[0][part])
    assert all(np.array_equal(out, outs[0]) for out in outs)


def test_refusals(name):
    cache = make(name)
    sequence = cache.allocate()
    cache.append([sequence], [5])
    for length in (-1, 6):
        with pytest.raises(ValueError, match=f"length is {length}; sequence {sequence} has 5 tokens"):
            cache.truncate(sequence, length)
    assert cache.length(sequence) == 5
    with pytest.raises(ValueError, match=r"kv_cache_bytes is 10; one block of this model takes \d+"):
        CACHES[name](shape(), 10, OperatorConfig())
    with pytest.raises(ValueError, match="block_tokens is 24; it must be a multiple of 16"):
        CACHES[name](shape(), 1 << 20, OperatorConfig(), 24)


def test_memory_is_what_was_asked_for(name):
    capacity = 1 << 20
    stats = CACHES[name](shape(), capacity, OperatorConfig(), 16).stats()
    assert capacity - 16 * shape().bytes_per_token < stats.capacity_bytes <= capacity
    assert stats.capacity_tokens * shape().bytes_per_token == stats.capacity_bytes


@pytest.mark.parametrize(
    ("head_dim", "kind", "l2_kib", "expected"),
    [(64, BF16, 1024, 256), (128, BF16, 1024, 256), (128, BF16, 512, 256), (128, F32, 512, 128), (256, F32, 256, 32)],
)
def test_a_block_fits_a_quarter_of_l2(head_dim, kind, l2_kib, expected):
    assert block_tokens_for(CacheShape(1, 1, head_dim, kind), l2_kib << 10) == expected
