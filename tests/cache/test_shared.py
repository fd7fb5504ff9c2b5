"""Blocks that several sequences hold, and beginnings that are known by their content: PAGED and SLAB_POOL."""

from functools import partial

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from pace.cache import CacheFull
from tests.kernels.arrays import F32

from .small import GROUP, HEAD_DIM, KV_HEADS, LAYERS, SCALE, fill, make, shape
from .test_caches import LIVES, Life

BLOCK = 16
BLOCK_BYTES = BLOCK * shape().bytes_per_token


@pytest.fixture(params=["PAGED", "SLAB_POOL"])
def new(request):
    """Makes a cache that knows beginnings."""
    return partial(make, request.param, prefix_caching=True)


class Books(Life):
    """The same life, with the books checked after each step."""

    kind = F32

    @invariant()
    def every_block_is_accounted_for(self):
        cache = self.cache
        held = [block for sequence in self.histories for block in cache._blocks_held(sequence).tolist()]
        holders = np.bincount(np.array([*held, *cache._digests], int), minlength=cache.num_blocks)
        free = cache._free[: cache._num_free].tolist()
        assert sorted(free) == np.flatnonzero(holders == 0).tolist()
        assert np.array_equal(cache._sharers[holders > 0], holders[holders > 0] - 1)
        assert not cache._sharers[free].any()
        assert cache._num_shared == cache._sharers.sum()
        assert set(cache._idle) == set(cache._digests) - set(held)
        assert {block: digest for digest, block in cache._index.items()} == cache._digests
        assert cache.stats().used_bytes == len(set(held)) * cache.block_bytes


@pytest.mark.parametrize(("name", "options"), [life for life in LIVES if life[0] in ("PAGED", "SLAB_POOL")])
def test_every_block_is_accounted_for(name, options):
    machine = type("Machine", (Books,), {"name": name, "options": options})
    run_state_machine_as_test(machine, settings=settings(max_examples=100, stateful_step_count=40, deadline=None))


def tokens_of(*runs):
    """Blocks, each of one id."""
    return np.repeat(np.array(runs, np.int32), BLOCK)


def add(cache, tokens, sequence=None):
    """Tokens to a sequence, or to a new one that begins with what there is; keys and values that are the tokens."""
    if sequence is None:
        sequence = cache.allocate(tokens)
        tokens = tokens[cache.length(sequence) :]
    placement = cache.append([sequence], [len(tokens)], tokens)
    k = np.broadcast_to(tokens.astype(np.float32)[:, None, None], (len(tokens), KV_HEADS, HEAD_DIM)).copy()
    q = np.zeros((len(tokens), KV_HEADS * GROUP, HEAD_DIM), np.float32)
    for layer in range(LAYERS):
        cache.attend(layer, q, k, k, placement, SCALE)
    return sequence


def mean_of(cache, sequence, layer=LAYERS - 1):
    """Of the values that a query of zeros sees, in a token of value 0 that is taken back."""
    length = cache.length(sequence)
    k = np.zeros((1, KV_HEADS, HEAD_DIM), np.float32)
    out = cache.attend(
        layer, np.zeros((1, KV_HEADS * GROUP, HEAD_DIM), np.float32), k, k, cache.append([sequence], [1]), SCALE
    )
    cache.truncate(sequence, length)
    return float(out[0, 0, 0]) * (length + 1) / length


def test_a_prompt_begins_with_what_is_there(new):
    cache = new(blocks=20)
    first = add(cache, tokens_of(1, 2, 3, 4))
    for prompt, length in (
        (tokens_of(1, 2, 3, 4), 3 * BLOCK),  # the last token is left to be computed
        (tokens_of(1, 2, 3, 4, 5), 4 * BLOCK),
        (tokens_of(1, 2, 5, 4), 2 * BLOCK),
        (tokens_of(1, 2)[:-1], BLOCK),
        (tokens_of(2, 3, 4), 0),  # the same blocks, but not at the beginning
        (tokens_of(1)[:5], 0),
        (tokens_of()[:0], 0),
    ):
        other = cache.allocate(prompt)
        assert cache.length(other) == length, prompt
        assert cache.stats().used_bytes == 4 * BLOCK_BYTES  # nothing of its own yet
        if length:
            assert mean_of(cache, other) == pytest.approx(prompt[:length].mean())
        cache.free(other)
    assert (cache.stats().prefix_hits, cache.stats().prefix_tokens) == (4, 10 * BLOCK)
    assert cache.length(cache.allocate(tokens_of(1, 2, 3).tolist())) == 2 * BLOCK  # a list does as well
    assert cache.length(first) == 4 * BLOCK


def test_tokens_after_a_prompt_are_known_too(new):
    """Those of an answer, which came one by one; not before the block is full."""
    cache = new(blocks=20)
    first = add(cache, tokens_of(1, 2)[:-2])
    assert cache.length(cache.allocate(tokens_of(1, 2, 3))) == BLOCK
    for token in (2, 2):
        add(cache, np.array([token], np.int32), first)
    assert cache.length(cache.allocate(tokens_of(1, 2, 3))) == 2 * BLOCK


def test_what_was_said_without_its_tokens_is_nobodys(new):
    cache = new(blocks=20)
    first = add(cache, tokens_of(1))
    fill(cache, first, BLOCK)
    add(cache, tokens_of(3), first)
    assert cache.length(cache.allocate(tokens_of(1, 2, 3, 4))) == BLOCK
    cache.free(first)
    assert cache.stats().cached_bytes == 0  # the block of ones is still held
    with pytest.raises(ValueError, match=r"tokens has shape \(3,\); it must be \(4,\)"):
        cache.append([cache.allocate()], [4], np.zeros(3, np.int32))


def test_it_stays_when_its_sequence_is_gone(new):
    cache = new(blocks=20)
    cache.free(add(cache, tokens_of(1, 2, 3)))
    stats = cache.stats()
    assert (stats.used_bytes, stats.cached_bytes) == (0, 3 * BLOCK_BYTES)
    again = cache.allocate(tokens_of(1, 2, 3, 9))
    assert cache.length(again) == 3 * BLOCK
    assert cache.stats().cached_bytes == 0
    assert mean_of(cache, again) == pytest.approx(2)


def test_the_longest_idle_goes_first_and_the_end_before_the_beginning(new):
    cache = new(blocks=6)
    for tokens in (tokens_of(1, 2, 3), tokens_of(4, 5)):
        cache.free(add(cache, tokens))
    cache.free(cache.allocate(tokens_of(1, 9)))  # so that 1 is the one used last, and 3 and 2 the longest idle

    def known():
        # Looked at without being used.
        return [len(cache._known(prompt)[0]) for prompt in (tokens_of(1, 2, 3, 0), tokens_of(4, 5, 0))]

    assert known() == [3, 2]
    filler = cache.allocate()
    expected = [[3, 2], [2, 2], [1, 2], [1, 1], [1, 0], [0, 0]]
    for lengths in expected:
        fill(cache, filler, BLOCK)
        assert known() == lengths
    assert cache.stats().cached_bytes == 0
    with pytest.raises(CacheFull):
        cache.append([filler], [1])


def test_a_failed_append_evicts_nothing(new):
    cache = new(blocks=4)
    cache.free(add(cache, tokens_of(1, 2)))
    sequence = cache.allocate()
    with pytest.raises(CacheFull):
        cache.append([sequence], [5 * BLOCK])
    assert cache.length(cache.allocate(tokens_of(1, 2, 3))) == 2 * BLOCK


def test_a_fork_costs_nothing_until_it_goes_on(new):
    cache = new(blocks=6)
    first = add(cache, tokens_of(1, 2, 3)[:-5])
    forks = [cache.fork(first) for _ in range(50)]
    assert cache.stats().used_bytes == 3 * BLOCK_BYTES
    add(cache, np.full(2, 7, np.int32), forks[0])
    assert cache.stats().used_bytes == 4 * BLOCK_BYTES  # a copy of the last block
    assert mean_of(cache, forks[0]) == pytest.approx(np.r_[tokens_of(1, 2, 3)[:-5], 7, 7].mean())
    for sequence in (first, *forks[1:]):
        assert cache.length(sequence) == 3 * BLOCK - 5
    assert cache._blocks_held(first).tolist() == cache._blocks_held(forks[1]).tolist()
    for fork in forks[1:]:
        cache.free(fork)
    assert mean_of(cache, first) == pytest.approx(tokens_of(1, 2, 3)[:-5].mean())


def test_the_last_of_those_who_go_on_keeps_the_block(new):
    """Two forks need one block more, not two; and where that one is not there, nothing has changed."""
    for blocks, fits in ((2, True), (1, False)):
        cache = new(blocks=blocks)
        first = add(cache, tokens_of(1)[:5])
        fork = cache.fork(first)
        if fits:
            cache.append([first, fork], [3, 2])
            assert cache.stats().used_bytes == 2 * BLOCK_BYTES
            assert cache._blocks_held(first) != cache._blocks_held(fork)
        else:
            with pytest.raises(CacheFull, match="room for 16 more tokens is needed; 0 of 16 are free"):
                cache.append([first, fork], [3, 2])
            assert cache._blocks_held(first) == cache._blocks_held(fork)
            assert cache.length(first) == cache.length(fork) == 5


def test_a_block_that_is_written_anew_is_not_known_by_its_old_content(new):
    cache = new(blocks=8)
    first = add(cache, tokens_of(1, 2))
    assert cache.length(cache.allocate(tokens_of(1, 2, 3))) == 2 * BLOCK
    cache.free(1)
    cache.truncate(first, BLOCK + 4)
    add(cache, np.full(BLOCK - 4, 9, np.int32), first)
    assert cache.length(cache.allocate(tokens_of(1, 2, 3))) == BLOCK
    mixed = np.r_[tokens_of(1), [2] * 4, [9] * (BLOCK - 4), 5].astype(np.int32)
    again = cache.allocate(mixed)
    assert cache.length(again) == 2 * BLOCK
    assert mean_of(cache, again) == pytest.approx(mixed[:-1].mean())


def test_a_block_that_others_hold_is_copied_before_it_is_written_anew(new):
    cache = new(blocks=8)
    first = add(cache, tokens_of(1, 2))
    other = cache.allocate(tokens_of(1, 2, 3))
    cache.truncate(first, BLOCK + 4)
    add(cache, np.full(BLOCK - 4, 9, np.int32), first)
    assert mean_of(cache, other) == pytest.approx(1.5)
    assert mean_of(cache, first) == pytest.approx(np.r_[tokens_of(1), [2] * 4, [9] * (BLOCK - 4)].mean())
    assert cache.length(cache.allocate(tokens_of(1, 2, 3))) == 2 * BLOCK


def test_a_copy_is_known_by_all_of_its_content(new):
    cache = new(blocks=8)
    cache.free(add(cache, tokens_of(9, 8, 7)[:-1]))  # no block is as new
    first = add(cache, tokens_of(1)[:5])
    fork = cache.fork(first)
    add(cache, tokens_of(1)[5:], fork)
    cache.free(first)
    again = cache.allocate(tokens_of(1, 2))
    assert cache.length(again) == BLOCK
    assert mean_of(cache, again) == pytest.approx(1)


def test_what_was_taken_back_was_never_there(new):
    """A step that failed: its tokens have no keys, and nobody may begin with them."""
    cache = new(blocks=8)
    first = add(cache, tokens_of(1))
    cache.append([first], [BLOCK], tokens_of(2))
    cache.truncate(first, BLOCK)
    cache.free(first)
    assert cache.length(cache.allocate(tokens_of(1, 2, 3))) == BLOCK


def test_what_was_computed_twice_is_kept_once(new):
    cache = new(blocks=8)
    both = [cache.allocate(tokens_of(1, 2)) for _ in range(2)]  # nobody has it yet
    for sequence in both:
        add(cache, tokens_of(1, 2), sequence)
    assert cache.stats().used_bytes == 4 * BLOCK_BYTES
    cache.allocate(tokens_of(1, 3))
    assert cache.stats().used_bytes == 2 * BLOCK_BYTES
    for sequence in both:
        assert mean_of(cache, sequence) == pytest.approx(1.5)
