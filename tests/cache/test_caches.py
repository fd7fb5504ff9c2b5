"""One suite over every cache: a random life of many sequences, against plain lists of keys and values."""

import gc
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

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
    precondition,
    rule,
    run_state_machine_as_test,
)

from pace.cache import CACHES, CacheShape
from pace.cache.base import CacheFull
from pace.cache.shared import SharedBlocks
from pace.cache.slab_pool import block_tokens_for
from pace.ops import OperatorConfig
from tests.kernels.arrays import BF16, F32, KINDS

from .small import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    MAX_TOKENS,
    SCALE,
    TOLERANCE,
    attended,
    block_of,
    fill,
    make,
    resident_bytes,
    shape,
)

BLOCK_TOKENS = [16, 32, 48]
# Keys and values of a token, (layers, 2, kv_heads, head_dim), are drawn by what stands before it and itself.
CONTENTS = np.random.default_rng(0).standard_normal((1 << 12, LAYERS, 2, KV_HEADS, HEAD_DIM))
UNKNOWN = -1


def follow(history, tokens):
    """A history has for each token of a sequence a number that stands for all tokens up to it."""
    history = list(history)
    for token in tokens:
        history.append(hash((history[-1] if history else 0, int(token))))
    return history


def contents(history, kind):
    """(layers, 2, tokens, kv_heads, head_dim)"""
    places = np.array([number % len(CONTENTS) for number in history], int)
    return CONTENTS[places].transpose(1, 2, 0, 3, 4).astype(kind)


class Life(RuleBasedStateMachine):
    """The model: for each sequence its history."""

    name: str
    kind: np.dtype
    options: ClassVar = {}
    sequences = Bundle("sequences")
    # Few ids, and blocks of one id, so that many sequences begin alike.
    tokens = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([1, 15, 16, 17, 48])), max_size=4).map(
        lambda runs: [token for token, count in runs for _ in range(count)]
    )

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.histories = {}
        self.strangers = 0  # tokens whose ids were not given

    @initialize(target=sequences, block_tokens=st.sampled_from(BLOCK_TOKENS), blocks=st.integers(1, 20))
    def begin(self, block_tokens, blocks):
        self.cache = make(self.name, self.kind, block_tokens, blocks, **self.options)
        self.shares_prefixes = getattr(self.cache, "prefix_caching", False)
        return multiple(*(self.allocate_one(None) for _ in range(3)))

    @rule(target=sequences, prompt=st.none() | tokens)
    def allocate(self, prompt):
        return self.allocate_one(prompt)

    def allocate_one(self, prompt):
        least = 0 if prompt is None else self.shared_with_the_living(prompt)
        total = len(prompt or ()) + 5
        needed, free = self.cache.tokens_needed(total, prompt), self.cache.free_tokens()
        assert needed <= self.cache.tokens_needed(total)
        sequence = self.cache.allocate(prompt)
        held = self.cache.tokens_needed(self.cache.length(sequence))
        # What is held of the prompt, less what was held before, and what is still to be taken.
        assert free - self.cache.free_tokens() + self.cache.tokens_needed(total) - held == needed
        assert sequence not in self.histories
        length = self.cache.length(sequence)
        assert length >= least
        if length:
            assert self.shares_prefixes
            assert length % self.cache.block_tokens == 0
            assert length < len(prompt)
        self.histories[sequence] = follow([], prompt[:length] if length else [])
        return sequence

    def shared_with_the_living(self, prompt):
        """Tokens in whole blocks that the prompt, but for its last, has in common with one that lives."""
        if not self.shares_prefixes:
            return 0
        wanted = follow([], prompt[:-1])
        common = [sum(a == b for a, b in zip(wanted, history, strict=False)) for history in self.histories.values()]
        return max(common, default=0) // self.cache.block_tokens * self.cache.block_tokens

    @rule(sequence=sequences, tokens=tokens)
    def append_to_one(self, sequence, tokens):
        self.append([(sequence, tokens)], given=True)

    @rule(token=st.integers(0, 1))
    def append_to_all(self, token):
        self.append([(sequence, [token]) for sequence in self.histories], given=True)

    @rule(
        chosen=st.lists(st.tuples(sequences, tokens), max_size=4, unique_by=lambda pair: pair[0]), given=st.booleans()
    )
    def append_to_some(self, chosen, given):
        self.append(chosen, given)

    def append(self, chosen, given):
        ids, counts = [sequence for sequence, _ in chosen], [len(tokens) for _, tokens in chosen]
        new = np.array([token for _, tokens in chosen for token in tokens], np.int32)
        before = self.cache.stats()
        try:
            placement = self.cache.append(ids, counts, new if given else None)
        except CacheFull:
            assert self.cache.stats() == before  # all or nothing
            needed = {s: self.length(s) for s in self.histories} | {s: self.length(s) + len(t) for s, t in chosen}
            assert sum(map(self.cache.tokens_needed, needed.values())) > before.capacity_tokens
            return
        lengths = [self.length(s) for s in ids]
        assert placement.starts.tolist() == [0, *np.cumsum(counts)]
        assert placement.lengths.tolist() == [length + n for length, n in zip(lengths, counts, strict=True)]
        positions = [at for length, n in zip(lengths, counts, strict=True) for at in range(length, length + n)]
        assert placement.positions.tolist() == positions
        for sequence, tokens in chosen:
            if not given:
                tokens = range(1000 + self.strangers, 1000 + self.strangers + len(tokens))
                self.strangers += len(tokens)
            self.histories[sequence] = follow(self.histories[sequence], tokens)
        self.attend(ids, placement)

    def attend(self, ids, placement):
        whole = [contents(self.histories[sequence], self.kind) for sequence in ids]
        pieces = list(zip(placement.starts[:-1], placement.starts[1:], whole, strict=True))
        q = self.rng.standard_normal((placement.starts[-1], KV_HEADS * GROUP, HEAD_DIM)).astype(self.kind)
        for layer in range(LAYERS):
            new = [each[layer, :, each.shape[2] - (stop - start) :] for start, stop, each in pieces]
            k, v = np.concatenate([np.empty((2, 0, KV_HEADS, HEAD_DIM), self.kind), *new], axis=1)
            actual = self.cache.attend(layer, q, k, v, placement, SCALE)
            assert actual.shape == q.shape
            for start, stop, each in pieces:
                if start < stop:
                    expected = attended(q[start:stop], *each[layer])
                    np.testing.assert_allclose(actual[start:stop].astype(float), expected, **TOLERANCE[self.kind])

    @rule(sequence=sequences, keep=st.floats(0, 1))
    def truncate(self, sequence, keep):
        length = int(keep * self.length(sequence))
        self.cache.truncate(sequence, length)
        del self.histories[sequence][length:]

    @rule(chosen=st.lists(st.tuples(sequences, st.integers(0, 70)), max_size=4, unique_by=lambda pair: pair[0]))
    def cut(self, chosen):
        lengths = [max(0, self.length(sequence) - less) for sequence, less in chosen]
        self.cache.cut([sequence for sequence, _ in chosen], lengths)
        for (sequence, _), length in zip(chosen, lengths, strict=True):
            del self.histories[sequence][length:]

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        before = self.cache.stats()
        try:
            fork = self.cache.fork(sequence)
        except CacheFull:
            assert self.cache.stats() == before
            return multiple()
        assert fork not in self.histories
        self.histories[fork] = self.histories[sequence][:]
        return fork

    @precondition(lambda self: len(self.histories) > 2)
    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        del self.histories[sequence]

    def length(self, sequence):
        return len(self.histories[sequence])

    @invariant()
    def lengths_and_room(self):
        stats, per_token = self.cache.stats(), shape(self.kind).bytes_per_token
        lengths = [self.length(sequence) for sequence in self.histories]
        assert stats.used_tokens == sum(lengths)
        assert [self.cache.length(sequence) for sequence in self.histories] == lengths
        most = sum(map(self.cache.tokens_needed, lengths)) * per_token
        assert stats.used_bytes <= most if isinstance(self.cache, SharedBlocks) else stats.used_bytes == most
        assert max(lengths, default=0) * per_token <= stats.used_bytes <= stats.capacity_bytes
        assert stats.used_bytes + stats.cached_bytes <= stats.capacity_bytes

    def teardown(self):
        for sequence in self.histories:
            self.cache.free(sequence)
        stats = self.cache.stats()
        assert (stats.used_tokens, stats.used_bytes) == (0, 0)
        everything = self.cache.allocate()  # nothing leaked: it can all be had again
        self.cache.append([everything], [stats.capacity_tokens])
        assert self.cache.stats().cached_bytes == 0
        with pytest.raises(CacheFull):
            self.cache.append([everything], [1])


def live(name, kind, options, examples, steps):
    machine = type("Machine", (Life,), {"name": name, "kind": kind, "options": options})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    )


LIVES = [
    *((name, {}) for name in CACHES),
    ("SLAB_POOL", {"prefix_caching": True}),
    ("PAGED", {"prefix_caching": False}),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("name", "options"), LIVES)
def test_a_random_life(name, kind, options):
    live(name, kind, options, examples=80, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("name", "options"), LIVES)
def test_many_random_lives(name, kind, options):
    live(name, kind, options, examples=1500, steps=80)


@pytest.mark.parametrize("name", ["BMC", "DYNAMIC"])
def test_contiguous_caches_share_no_prefixes(name):
    assert make(name, prefix_caching=False).stats().prefix_hits == 0
    with pytest.raises(ValueError, match="prefix_caching needs blocks that sequences can share: use PAGED or SLAB"):
        make(name, prefix_caching=True)


@pytest.fixture(params=CACHES)
def name(request):
    return request.param


def test_a_full_cache_changes_nothing(name):
    cache, block = make(name, blocks=3), block_of(name)
    first, second = cache.allocate(), cache.allocate()
    count = block + 4
    placement = cache.append([first], [count])
    k, q = np.ones((count, KV_HEADS, HEAD_DIM), np.float32), np.ones((count, KV_HEADS * GROUP, HEAD_DIM), np.float32)
    before = [cache.attend(layer, q, k, k, placement, SCALE) for layer in range(LAYERS)]
    for sequences, counts in (
        ([first], [2 * block]),
        ([first, second], [5, block + 1]),
        ([second, first], [block + 1, 1]),
    ):
        with pytest.raises(CacheFull, match=r"room for \d+ more tokens is needed; \d+ of \d+ are free"):
            cache.append(sequences, counts)
        with pytest.raises(CacheFull, match="needed"):
            cache.append([cache.fork(first)], [2 * block])
        if isinstance(cache, SharedBlocks):  # where a fork needs no room
            cache.free(2)
    assert (cache.length(first), cache.length(second)) == (count, 0)
    again = [cache.attend(layer, q, k, k, placement, SCALE) for layer in range(LAYERS)]
    assert np.array_equal(before, again)
    cache.append([first, second], [block - 4, block])


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


# What a model may have a query see, beside all up to its own; spans of 8 positions.
SEEN = {
    "window": 50,
    "sinks": np.linspace(-1, 1, KV_HEADS * GROUP, dtype=np.float32),
    "softcap": 2.0,
    "spans": 8,
}


def life_of(cache, kind, spans=None, **seen):
    """A long life of many sequences, in chunks, with forks and truncations: all that was attended."""
    rng = np.random.default_rng(1)
    drawn = rng.standard_normal((3, 4000, KV_HEADS * GROUP, HEAD_DIM)).astype(kind)
    outs = []

    def append(sequences, counts, at):
        """The tokens of a sequence are drawn from `at` on."""
        placement = cache.append(sequences, counts)
        if spans is not None:
            begin = placement.positions // spans * spans
            end = np.minimum(begin + spans, placement.lengths.repeat(counts))
            placement = replace(placement, spans=np.stack([begin, end], axis=1))
        places = np.concatenate([np.arange(a, a + n) for a, n in zip(at, counts, strict=True)])
        q, k, v = drawn[:, places]
        outs.extend(
            cache.attend(layer, q, k[:, :KV_HEADS], v[:, :KV_HEADS], placement, SCALE, **seen)
            for layer in range(LAYERS)
        )

    a, b, c = (cache.allocate() for _ in range(3))
    append([a, b, c], [1, 100, 33], [0, 1000, 2000])
    append([c, a], [290, 70], [2033, 1])
    fork = cache.fork(c)
    append([fork, c, b], [1, 1, 1], [3500, 3600, 1100])
    for sequence, length in ((c, 300), (fork, 17), (a, 0)):
        cache.truncate(sequence, length)
    append([a, fork], [40, 130], [500, 3000])
    cache.free(b)
    b = cache.allocate()
    append([c, b, a, fork], [7, 64, 1, 2], [3700, 100, 700, 800])
    for step in range(5):
        append([a, b, c, fork], [1] * 4, [900 + 10 * step + i for i in range(4)])
    return outs


@pytest.mark.parametrize("seen", [{}, SEEN], ids=["all", "some"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_bits_from_every_cache_and_block_size(rung, kind, seen):
    lives = {
        (name, block_tokens): life_of(make(name, kind, block_tokens, blocks=-(-4000 // block_tokens)), kind, **seen)
        for name in CACHES
        for block_tokens in (16, 48, 256)
    }
    expected = lives["SLAB_POOL", 256]
    for which, outs in lives.items():
        assert all(np.array_equal(a, b) for a, b in zip(outs, expected, strict=True)), which


@pytest.mark.parametrize("what", SEEN)
def test_what_a_query_sees_is_passed_on(name, what):
    plain, other = (life_of(make(name, blocks=250), F32, **seen) for seen in ({}, {what: SEEN[what]}))
    assert any(not np.allclose(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_chunks_do_not_change_the_numbers(name, rung, kind):
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


@pytest.mark.skipif(sys.platform != "linux", reason="/proc: for Linux")
@pytest.mark.parametrize("tokens_given", [False, True])
def test_hundreds_of_sequences_come_and_go(name, tokens_given):
    cache, rng = make(name, blocks=200), np.random.default_rng(0)
    living, resident = [], []
    for i in range(400):
        prompt = rng.integers(0, 1000, rng.integers(2, 200)).astype(np.int32)
        sequence = cache.allocate(prompt if tokens_given else None)
        placement = cache.append([sequence], [len(prompt)], prompt if tokens_given else None)
        q = np.ones((len(prompt), KV_HEADS * GROUP, HEAD_DIM), np.float32)
        for layer in range(LAYERS):
            cache.attend(layer, q, q[:, :KV_HEADS], q[:, :KV_HEADS], placement, SCALE)
        living.append(sequence)
        if i % 3 == 0:
            living.append(cache.fork(sequence))
        cache.truncate(sequence, len(prompt) // 2)
        while len(living) > 6:
            cache.free(living.pop(rng.integers(len(living))))
        if i % 40 == 20:
            gc.collect()
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert len(cache._lengths) == 16  # rows of ended sequences are used again
    for sequence in living:
        cache.free(sequence)
    # The first measurement may come before a pool's last pages were touched; that much, and a few arenas of Python's.
    assert resident[-1] <= resident[0] + cache.stats().capacity_bytes + (4 << 20)
    assert resident[-1] <= resident[4] + (4 << 20)
    stats = cache.stats()
    assert (stats.used_tokens, stats.used_bytes) == (0, 0)
    cache.append([cache.allocate()], [min(stats.capacity_tokens, MAX_TOKENS)])


def test_tokens_that_cannot_be_are_refused_before_anything_changes(name):
    cache = make(name)
    sequence = cache.allocate()
    for tokens, error in (([1, 2], ValueError), ([1, 2, 2**31], ValueError), ([1.5, 2, 3], TypeError)):
        with pytest.raises(error, match="tokens has"):
            cache.append([sequence], [3], np.array(tokens))
    with pytest.raises(ValueError, match=r"tokens has shape \(3, 2\); it must be \(3,\)"):
        cache.append([sequence], [3], np.zeros((3, 2), np.int32))
    assert (cache.length(sequence), cache.stats().used_bytes) == (0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc: for Linux")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_budget_is_what_the_system_gives(name, kind):
    """Filled to the last token, in every layer: no page more than was asked for."""
    cache = make(name, kind, blocks=100)
    assert resident_bytes(cache) == 0
    sequences = [cache.allocate() for _ in range(12)]
    with suppress(CacheFull):
        for _ in range(20):
            for sequence in sequences:
                fill(cache, sequence, 50, kind)
    stats = cache.stats()
    per_token = shape(kind).bytes_per_token
    assert stats.used_tokens * per_token <= resident_bytes(cache)
    held = stats.capacity_bytes if name in ("SLAB_POOL", "PAGED") else stats.used_bytes  # huge pages come whole
    assert resident_bytes(cache) <= held <= stats.capacity_bytes


def test_at_most_one_block_of_a_sequence_is_not_full(name):
    cache, block = make(name, blocks=60), block_of(name)
    lengths = [1, 15, 16, 17, block, block + 1, 3 * block - 1]
    for length in lengths:
        cache.append([cache.allocate()], [length])
        held = cache.tokens_needed(length)
        assert length <= held < 2 * length if name == "DYNAMIC" and length > block else held < length + block
    used = sum(map(cache.tokens_needed, lengths)) * shape().bytes_per_token
    assert cache.stats().used_bytes == used


def test_what_can_not_be_cut(name):
    cache = make(name, blocks=40)
    cache.append([cache.allocate(), cache.allocate()], [20, 30])
    for length in (31, -1):
        with pytest.raises(ValueError, match=rf"length is {length}; sequence 1 has 30 tokens"):
            cache.cut([1], [length])
    with pytest.raises(ValueError, match="sequence 7 is not in the cache"):
        cache.cut([0, 7], [0, 0])
    assert [cache.length(i) for i in range(2)] == [20, 30]


def test_refusals(name):
    cache = make(name)
    sequence, ended = cache.allocate(), cache.allocate()
    cache.append([sequence], [5])
    cache.free(ended)
    for length in (-1, 6):
        with pytest.raises(ValueError, match=f"length is {length}; sequence {sequence} has 5 tokens"):
            cache.truncate(sequence, length)
    for unknown in (ended, -1, 99):
        for call in (
            lambda s: cache.append([sequence, s], [1, 1]),
            cache.length,
            cache.fork,
            cache.free,
            lambda s: cache.truncate(s, 0),
        ):
            with pytest.raises(ValueError, match=f"sequence {unknown} is not in the cache"):
                call(unknown)
    with pytest.raises(ValueError, match=r"sequences are \[0, 0\]; each can be appended to once"):
        cache.append([sequence, sequence], [1, 1])
    for counts in ([1, 1], [-1]):
        with pytest.raises(ValueError, match="it must be 1 numbers of tokens, none below 0"):
            cache.append([sequence], counts)
    with pytest.raises(ValueError, match=rf"would have {MAX_TOKENS + 1} tokens; the longest may have {MAX_TOKENS}"):
        cache.append([sequence], [MAX_TOKENS - 4])
    assert cache.length(sequence) == 5
    assert cache.stats().used_tokens == 5
    with pytest.raises(ValueError, match=r"kv_cache_bytes is 10; one block of this model takes \d+"):
        CACHES[name](shape(), 10, OperatorConfig())
    for block_tokens in (24, 0, -16):
        with pytest.raises(ValueError, match=f"block_tokens is {block_tokens}; it must be a multiple of 16"):
            CACHES[name](shape(), 1 << 20, OperatorConfig(), block_tokens)


def test_memory_is_what_was_asked_for(name):
    capacity = (1 << 20) + 1000
    for block_tokens in (None, 16, 48):
        cache = CACHES[name](shape(), capacity, OperatorConfig(), block_tokens)
        stats = cache.stats()
        assert capacity - cache.tokens_needed(1) * shape().bytes_per_token < stats.capacity_bytes <= capacity
        assert stats.capacity_tokens * shape().bytes_per_token == stats.capacity_bytes
        assert stats.capacity_tokens % cache.tokens_needed(1) == 0


@pytest.mark.parametrize(
    ("head_dim", "kind", "l2_kib", "expected"),
    [(64, BF16, 1024, 256), (128, BF16, 1024, 256), (128, BF16, 512, 256), (128, F32, 512, 128), (256, F32, 256, 32)],
)
def test_a_block_fits_a_quarter_of_l2(head_dim, kind, l2_kib, expected):
    assert block_tokens_for(CacheShape(1, 1, head_dim, kind, MAX_TOKENS), l2_kib << 10) == expected
