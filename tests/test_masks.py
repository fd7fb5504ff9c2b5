"""Masks by what they say: found again, in bounded memory, and left alone while they are read."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace.reference.masks import MaskCache, visible_keys


def expected(first, count, length, window, spans):
    """One by one."""
    mask = np.zeros((count, length), bool)
    for i in range(count):
        for key in range(length):
            near = key <= first + i and (window is None or key > first + i - window)
            mask[i, key] = near or (spans is not None and spans[i, 0] <= key < spans[i, 1])
    return mask


@st.composite
def requests(draw):
    """What a mask is asked for with; a span holds its query or is none, as attend requires."""
    first, count, beyond = draw(st.integers(0, 12)), draw(st.integers(1, 6)), draw(st.integers(0, 5))
    length = first + count + beyond
    spans = np.zeros((count, 2), np.int32)
    for i in range(count):
        if draw(st.booleans()):
            spans[i] = draw(st.integers(0, first + i)), draw(st.integers(first + i + 1, length))
    return first, count, length, draw(st.none() | st.integers(1, 20)), draw(st.sampled_from([None, spans]))


@given(requests())
def test_says_which_keys_each_query_sees(request):
    first, count, length, window, spans = request
    with MaskCache(1000).mask(*request) as mask:
        assert np.array_equal(mask, expected(*request))
    begin, end = visible_keys(first, count, window, spans)
    assert begin.dtype == end.dtype == np.int64
    keys = np.arange(length)
    assert np.array_equal((begin[:, None] <= keys) & (keys < end[:, None]), expected(*request))


def test_positions_of_64_bits():
    begin, end = visible_keys(2**40, 2, 2**33, None)
    assert begin.tolist() == [2**40 + 1 - 2**33, 2**40 + 2 - 2**33]
    assert end.tolist() == [2**40 + 1, 2**40 + 2]


@given(st.lists(requests(), max_size=30), st.integers(0, 200))
def test_any_order_within_any_bound(asked, max_bytes):
    """Twice each, some inside of others."""
    cache = MaskCache(max_bytes)
    for request, other in zip(asked, asked[1:] + asked[:1], strict=True):
        with cache.mask(*request) as mask, cache.mask(*other) as inner:
            assert np.array_equal(mask, expected(*request))
            assert np.array_equal(inner, expected(*other))
            assert cache.used_bytes <= max_bytes
    assert cache.used_bytes == sum(kept.memory.nbytes for kept in cache._kept.values())
    assert cache.hits + cache.misses == 2 * len(asked)


def seen_again(cache, *request):
    before = cache.hits
    with cache.mask(*request):
        return cache.hits > before


def address(cache, *request):
    with cache.mask(*request) as mask:
        return mask.ctypes.data


def test_found_by_content():
    cache = MaskCache(1000)
    spans = np.array([[0, 0], [3, 6]], np.int32)
    request = (3, 2, 6, 4, spans)
    assert not seen_again(cache, *request)
    assert seen_again(cache, 3, 2, 6, 4, spans.copy())
    spans[1, 0] = 4  # another content in the same array
    for other in (
        (3, 2, 6, 4, spans),
        (3, 2, 6, 4, None),
        (3, 2, 6, 5, None),
        (3, 2, 6, None, None),
        (2, 2, 6, 4, None),
    ):
        assert not seen_again(cache, *other)
        assert seen_again(cache, *other)
    assert (cache.hits, cache.misses) == (6, 6)


def test_the_least_recently_used_gives_way():
    cache = MaskCache(300)
    for length in (100, 99, 98):
        assert not seen_again(cache, 0, 1, length, None, None)
    assert seen_again(cache, 0, 1, 100, None, None)
    assert not seen_again(cache, 0, 1, 97, None, None)
    assert seen_again(cache, 0, 1, 100, None, None)
    assert seen_again(cache, 0, 1, 98, None, None)
    assert not seen_again(cache, 0, 1, 99, None, None)


def test_memory_goes_to_the_next():
    cache = MaskCache(100)
    first = address(cache, 0, 1, 100, None, None)
    assert address(cache, 0, 1, 60, None, None) == first
    assert cache.used_bytes == 100  # the memory's, not the mask's
    assert not seen_again(cache, 0, 1, 100, None, None)


def test_small_masks_do_not_sit_in_large_memory():
    """After a long prompt, those of decoding are found again, layer for layer."""
    cache = MaskCache(10_000)
    for first in range(10):
        with cache.mask(first, 50, 200, None, None):
            assert cache.used_bytes == 10_000
    steps = [(length - 1, 1, length, None, None) for length in range(40, 60)]
    for step in steps:
        assert not seen_again(cache, *step)
    for step in steps:
        assert seen_again(cache, *step)


def test_what_is_read_stays():
    cache = MaskCache(200)
    one, two = (5, 1, 100, None, None), (6, 1, 100, None, None)
    with ExitStack() as reading:
        masks = {request: reading.enter_context(cache.mask(*request)) for request in (one, two)}
        again = reading.enter_context(cache.mask(*one))
        assert np.shares_memory(again, masks[one])
        for first in range(10, 20):  # no room beside them: each for its reader alone
            with cache.mask(first, 1, 100, None, None) as mask:
                assert np.array_equal(mask, expected(first, 1, 100, None, None))
                assert not any(np.shares_memory(mask, read) for read in masks.values())
        for request, mask in masks.items():
            assert np.array_equal(mask, expected(*request))
        assert cache.used_bytes == 200
    assert seen_again(cache, *one)
    assert not seen_again(cache, 10, 1, 100, None, None)
    assert seen_again(cache, 10, 1, 100, None, None)  # its readers gone, one of the two gave way


def test_a_reader_that_fails_lets_go():
    cache = MaskCache(100)
    with pytest.raises(KeyError), cache.mask(5, 1, 100, None, None):
        raise KeyError
    assert not seen_again(cache, 6, 1, 100, None, None)
    assert seen_again(cache, 6, 1, 100, None, None)


def test_larger_than_the_bound():
    cache = MaskCache(50)
    assert not seen_again(cache, 0, 1, 50, None, None)
    for _ in range(2):
        assert not seen_again(cache, 0, 1, 51, None, None)
    assert cache.used_bytes == 50
    assert seen_again(cache, 0, 1, 50, None, None)  # who is too large drives nobody out


def test_not_for_writing():
    cache = MaskCache(100)
    for length in (10, 1000):
        with cache.mask(0, 1, length, None, None) as mask, pytest.raises(ValueError, match="read-only"):
            mask[0, 0] = False


@pytest.fixture
def restless():
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_several_threads(restless):
    """More masks than there is room for; what a thread reads is never another mask meanwhile."""
    cache = MaskCache(400)
    requests = [(first, 2, 40, window, None) for first in range(8) for window in (None, 3)]
    truth = [expected(*request) for request in requests]

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, len(requests), 300):
            with cache.mask(*requests[i]) as mask:
                for _ in range(3):
                    assert np.array_equal(mask, truth[i])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert cache.used_bytes == sum(kept.memory.nbytes for kept in cache._kept.values()) <= 400
    assert all(kept.readers == 0 for kept in cache._kept.values())
    assert cache.hits + cache.misses == 1200
