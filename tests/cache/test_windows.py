"""Layers that see only so far: every cache holds what their windows need, and gives the bits of one that holds all."""

import sys
from contextlib import suppress
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import assume, settings
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

from pace.cache import CACHES, CacheFull, CacheShape
from pace.cache.shared import SharedBlocks
from pace.cache.windows import deal
from pace.ops import OperatorConfig
from tests.kernels.arrays import BF16, F32

from .small import GROUP, HEAD_DIM, KV_HEADS, SCALE, resident_bytes
from .test_caches import LIVES, follow

MAX_TOKENS = 1 << 11
MOST_LAYERS = 6
CONTENTS = np.random.default_rng(0).standard_normal((512, MOST_LAYERS, 2, KV_HEADS, HEAD_DIM)).astype(F32)


def contents(history):
    """(layers, 2, tokens, kv_heads, head_dim)"""
    return CONTENTS[np.array([number % len(CONTENTS) for number in history], int)].transpose(1, 2, 0, 3, 4)


def shape(windows, kind=F32):
    return CacheShape(len(windows), KV_HEADS, HEAD_DIM, kind, MAX_TOKENS, tuple(windows))


def make(name, windows, blocks, block_tokens=16, backend="NATIVE", **options):
    """With room for so many tokens in all layers, 16 at a time."""
    capacity = 16 * blocks * shape(windows).bytes_per_token
    return CACHES[name](shape(windows), capacity, OperatorConfig.all(backend), block_tokens, **options)


class Life(RuleBasedStateMachine):
    """Beside the cache lives one of the same kind that knows of no windows, and holds everything."""

    name: str
    backend: str
    options: ClassVar = {}
    sequences = Bundle("sequences")
    counts = st.sampled_from([1, 1, 5, 16, 33, 100])

    @initialize(
        target=sequences,
        windows=st.lists(st.sampled_from([None, 1, 7, 16, 20, 50]), min_size=1, max_size=MOST_LAYERS),
        block_tokens=st.sampled_from([16, 48]),
        blocks=st.integers(20, 60),
    )
    def begin(self, windows, block_tokens, blocks):
        self.windows = windows
        self.cache = make(self.name, windows, blocks, block_tokens, self.backend, **self.options)
        self.plain = make("SLAB_POOL", [None] * len(windows), 2000, 64, self.backend)
        self.rng = np.random.default_rng(0)
        self.histories, self.twins, self.chunks = {}, {}, {}
        return multiple(*(self.allocate(0, []) for _ in range(3)))

    def put(self, sequences, counts, given=None):
        """As many tokens to each in both caches; the same bits come out."""
        placement = self.cache.append(sequences, counts, given)
        twin = self.plain.append([self.twins[sequence] for sequence in sequences], counts)
        assert np.array_equal(placement.positions, twin.positions)
        new = [
            contents(self.histories[s][len(self.histories[s]) - n :]) for s, n in zip(sequences, counts, strict=True)
        ]
        new = np.concatenate([CONTENTS[:0].transpose(1, 2, 0, 3, 4), *new], axis=2)
        q = self.rng.standard_normal((sum(counts), KV_HEADS * GROUP, HEAD_DIM)).astype(F32)
        for layer, window in enumerate(self.windows):
            ours, theirs = (
                cache.attend(layer, q, *new[layer], at, SCALE, window=window)
                for cache, at in ((self.cache, placement), (self.plain, twin))
            )
            assert np.array_equal(ours, theirs)

    @rule(target=sequences, token=st.integers(0, 1), runs=st.lists(st.sampled_from([16, 48, 64]), max_size=4))
    def allocate(self, token, runs):
        prompt = [token + i for i, run in enumerate(runs) for _ in range(run)]
        sequence = self.cache.allocate(prompt)
        length = self.cache.length(sequence)
        assert length < max(len(prompt), 1)
        self.histories[sequence], self.chunks[sequence] = follow([], prompt[:length]), 1
        twin = self.twins[sequence] = self.plain.allocate()
        placement = self.plain.append([twin], [length])
        for layer, (k, v) in enumerate(contents(self.histories[sequence])[: len(self.windows)]):
            self.plain.attend(layer, k, k, v, placement, SCALE, window=1)
        return sequence

    @rule(
        chosen=st.lists(st.tuples(sequences, counts), max_size=4, unique_by=lambda pair: pair[0]),
        token=st.integers(0, 1),
    )
    def append(self, chosen, token):
        self.add([sequence for sequence, _ in chosen], [count for _, count in chosen], token)

    def add(self, sequences, counts, token):
        before = self.cache.stats(), self.cache._kept.copy()
        lengths = [len(self.histories[sequence]) for sequence in sequences]
        assume(all(length + count <= MAX_TOKENS for length, count in zip(lengths, counts, strict=True)))
        tokens = np.full(sum(counts), token, np.int32)
        for sequence, count in zip(sequences, counts, strict=True):
            self.histories[sequence] = follow(self.histories[sequence], [token] * count)
        try:
            self.put(sequences, counts, tokens)
        except CacheFull:
            for sequence, length in zip(sequences, lengths, strict=True):
                del self.histories[sequence][length:]
            assert self.cache.stats() == before[0]  # all or nothing
            assert np.array_equal(self.cache._kept, before[1])
            raise_to = dict(zip(sequences, lengths, strict=True))
            assert all(self.cache.length(s) == length for s, length in raise_to.items())
            if type(self) is Life:
                raise
            self.full = True
            return
        self.full = False
        unit = self.cache._window_tokens
        for sequence, length, count in zip(sequences, lengths, counts, strict=True):
            if -(-(length + count) // unit) > -(-length // unit):
                self.chunks[sequence] = count

    @rule(
        chosen=st.lists(
            st.tuples(sequences, st.integers(0, 300), st.sampled_from([1, 16, 40])),
            min_size=1, max_size=3, unique_by=lambda each: each[0],
        )
    )  # fmt: skip
    def what_is_promised_is_there(self, chosen):
        """Where what is to come has room, they get to their lengths, whoever goes first."""
        goals = {s: min(len(self.histories[s]) + more, MAX_TOKENS) for s, more, _ in chosen}
        chunks = [chunk for *_, chunk in chosen]
        come = self.cache.tokens_to_come(list(goals), np.array([*goals.values()]), np.array(chunks))
        if come > self.cache.free_tokens():
            return
        while any(goal > len(self.histories[s]) for s, goal in goals.items()):
            for (sequence, goal), chunk in zip(goals.items(), chunks, strict=True):
                count = min(chunk, goal - len(self.histories[sequence]))
                if count:
                    self.add([sequence], [count], 1)
                    assert not self.full

    @rule(sequence=sequences, drafts=st.integers(1, 40), accepted=st.integers(0, 40))
    def append_and_take_back(self, sequence, drafts, accepted):
        """As a step that failed does, and drafts that were not accepted."""
        length = len(self.histories[sequence])
        self.add([sequence], [drafts], 1)
        if not self.full:
            self.cut(sequence, length + min(accepted, drafts))

    def cut(self, sequence, length):
        self.cache.truncate(sequence, length)
        self.plain.truncate(self.twins[sequence], length)
        del self.histories[sequence][length:]

    @rule(sequence=sequences, keep=st.floats(0, 1))
    def truncate(self, sequence, keep):
        length, shortest = len(self.histories[sequence]), self.cache.shortest(sequence)
        wanted = int(keep * length)
        if 0 < wanted < shortest:
            with pytest.raises(ValueError, match=f"length is {wanted}; .* lengths from {shortest} to {length} need"):
                self.cache.truncate(sequence, wanted)
        else:
            self.cut(sequence, wanted)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        with suppress(CacheFull):
            fork = self.cache.fork(sequence)
            self.histories[fork], self.chunks[fork] = self.histories[sequence][:], self.chunks[sequence]
            self.twins[fork] = self.plain.fork(self.twins[sequence])
            return fork
        return multiple()

    @precondition(lambda self: len(self.histories) > 2)
    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.cache.free(sequence)
        self.plain.free(self.twins.pop(sequence))
        del self.histories[sequence], self.chunks[sequence]

    @invariant()
    def windows_hold_what_they_need(self):
        cache, unit = self.cache, self.cache._window_tokens
        for sequence, history in self.histories.items():
            for window, kept in zip(cache._windows, cache._kept[:, sequence], strict=True):
                held = (-(-len(history) // unit) - kept) * unit
                assert min(window, len(history)) <= held < window + self.chunks[sequence] + 2 * unit
            assert cache.held_tokens([sequence]) <= cache.tokens_needed(len(history), chunk=self.chunks[sequence])
        assert cache.stats().used_tokens == sum(map(len, self.histories.values()))

    @invariant()
    def every_block_is_accounted_for(self):
        cache = self.cache
        if not isinstance(cache, SharedBlocks):
            assert cache.stats().used_bytes <= cache.stats().capacity_bytes
            if sys.platform == "linux":
                assert resident_bytes(cache) <= cache.stats().used_bytes
            return
        held = [cache._blocks_held(sequence).tolist() for sequence in self.histories]
        assert all(len(set(blocks)) == len(blocks) for blocks in held)
        every = [block for blocks in held for block in blocks]
        holders = np.bincount(np.array([*every, *cache._digests], int), minlength=cache.num_blocks)
        assert sorted(cache._free[: cache._num_free].tolist()) == np.flatnonzero(holders == 0).tolist()
        assert np.array_equal(cache._sharers[holders > 0], holders[holders > 0] - 1)
        assert cache._num_shared == cache._sharers.sum()
        assert np.flatnonzero(cache._is_known).tolist() == sorted(cache._digests)
        assert set(cache._idle) == set(cache._digests) - set(every)
        assert {block: key for key, block in cache._index.items()} == cache._digests
        assert cache.stats().used_bytes == len(set(every)) * cache.block_bytes

    def teardown(self):
        for sequence in self.histories:
            self.cache.free(sequence)
        assert self.cache.stats().used_bytes == 0


@pytest.mark.parametrize("backend", ["NATIVE", "REFERENCE"])
@pytest.mark.parametrize(("name", "options"), LIVES)
def test_a_random_life(name, options, backend):
    machine = type("Machine", (Life,), {"name": name, "options": options, "backend": backend})
    examples = 25 if backend == "NATIVE" else 8  # the twins take ten times as long
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None))


@pytest.mark.parametrize(
    ("full", "windowed", "layers", "groups"),
    [(3, 15, 3, 6), (5, 29, 6, 6), (4, 22, 4, 7), (8, 40, 10, 5), (12, 12, 12, 2), (0, 32, 32, 1), (32, 0, 32, 1)],
)
def test_groups_of_equally_many_layers(full, windowed, layers, groups):
    """As gemma-3's 270m, 4b, 1b and 12b have them, GPT-OSS, and models of one kind."""
    dealt = deal(shape([None] * full + [8] * windowed))
    assert (dealt.layers, len(dealt.windows), dealt.num_full) == (layers, groups, -(-full // layers))
    assert len(set(dealt.places)) == full + windowed
    assert all(dealt.windows[group] == (None if layer < full else 8) for layer, (group, _) in enumerate(dealt.places))


@pytest.mark.parametrize("name", ["PAGED", "SLAB_POOL"])
def test_a_prompt_begins_where_every_group_has_what_it_sees(name):
    """What windows gave back is idle until its room is needed; then only the place where it went on is left."""
    windows = [None, 20, 20]
    tokens = np.arange(640, dtype=np.int32)
    for blocks, shared in ((200, 160), (41, 0)):
        cache = make(name, windows, blocks, prefix_caching=True)
        first = cache.allocate()
        for begin in range(0, 640, 16):
            cache.append([first], [16], tokens[begin : begin + 16])
        assert cache.length(cache.allocate(tokens[:161])) >= shared
        cache.free(first)
        again = cache.allocate(np.append(tokens, 5))
        assert cache.length(again) == 640
        held = 40 + 2 * 2  # of each window the 20 tokens before 640
        assert cache.stats().used_bytes - (shared > 0) * 0 >= held * cache.block_bytes


def test_a_twin_that_is_idle_costs_no_room():
    """What windows leave is entered in the index first, within the room that was found for the append."""
    cache = make("SLAB_POOL", [50], 38, 48, "REFERENCE", prefix_caching=True)
    sequences = [cache.allocate([]) for _ in range(3)]
    for length in range(146):
        growing = [s for s, most in zip(sequences, (146, 97, 130), strict=True) if length < most]
        cache.append(growing, [1] * len(growing), np.ones(len(growing), np.int32))
    cache.append(sequences[:1], [100], np.zeros(100, np.int32))
    fork = cache.fork(sequences[2])
    assert cache.free_parts() // cache.block_tokens == 2  # idle: for a block more, and one that the fork goes on in
    cache.append([fork], [15], np.ones(15, np.int32))
    assert cache.length(fork) == 145


@pytest.mark.parametrize("name", CACHES)
def test_refusals(name):
    for windows, match in (
        ([4], "has 1 layers; it must have 2, or none"),
        ([4, 0], "has 0; each"),
        ([1.5, 4], "has 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            CacheShape(2, KV_HEADS, HEAD_DIM, BF16, MAX_TOKENS, tuple(windows))
    cache = make(name, [None, 20], 60)
    q = np.ones((1, KV_HEADS * GROUP, HEAD_DIM), F32)
    placement = cache.append([cache.allocate()], [1])
    for window in (None, 21):
        with pytest.raises(ValueError, match=f"window is {window}; layer 1 of this cache holds what a window of 20"):
            cache.attend(1, q, q[:, :KV_HEADS], q[:, :KV_HEADS], placement, SCALE, window=window)
    with pytest.raises(ValueError, match="kv_cache_bytes is 100; one block of this model takes"):
        CACHES[name](shape([None, 20]), 100, OperatorConfig())
