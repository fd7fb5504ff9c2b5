"""What BMC and DYNAMIC alone do: a run for each head that grows in place, in steps that are counted."""

import sys

import numpy as np
import pytest

from pace.cache import BMC, CacheShape, Dynamic
from pace.cache.contiguous import ADDRESS_SPACE, page_tokens
from pace.cache.memory import PAGE, Memory
from pace.ops import OperatorConfig
from tests.kernels.arrays import BF16, F32, KINDS

from .small import MAX_TOKENS, fill, make, resident_bytes, shape

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc: for Linux")
CONTIGUOUS = pytest.mark.parametrize("name", ["BMC", "DYNAMIC"])


@pytest.mark.parametrize(
    ("head_dim", "kind", "expected"),
    [(64, BF16, 32), (128, BF16, 16), (80, BF16, 128), (96, BF16, 64), (128, F32, 16), (64, F32, 16), (256, BF16, 16)],
)
def test_whole_pages(head_dim, kind, expected):
    tokens = page_tokens(CacheShape(1, 1, head_dim, kind, 1))
    assert tokens * head_dim * kind.itemsize % PAGE == 0
    assert tokens == expected if PAGE == 4096 else tokens % 16 == 0


def steps(cache, lengths):
    return [cache.tokens_needed(length) for length in lengths]


def big(cache, max_tokens, **options):
    """Of a model whose groups are whole pages: a step is any multiple of 16."""
    shape = CacheShape(2, 2, 128, BF16, max_tokens)
    return cache(shape, 4 * max_tokens * shape.bytes_per_token, OperatorConfig(), **options)


def test_bmc_takes_steps_of_the_square_root():
    assert steps(big(BMC, 2048), [0, 1, 48, 49, 2048]) == [0, 48, 48, 96, 2064]  # 2048 // 45 is 45
    assert steps(big(BMC, 10000), [1]) == [112]  # 10000 // 100 is 100
    assert steps(big(BMC, 131072), [1, 369]) == [368, 736]  # 131072 // 362 is 362
    assert steps(big(BMC, 2048, splits=4), [1, 513, 2048]) == [512, 1024, 2048]
    assert steps(big(BMC, 2048, splits=1), [1]) == [2048]
    assert steps(big(BMC, 2048, block_tokens=256), [1, 257]) == [256, 512]
    for options in ({"splits": 0}, {"splits": 2, "block_tokens": 16}):
        with pytest.raises(ValueError, match=r"splits is \d; it must be 1 or more, and given without block_tokens"):
            big(BMC, 2048, **options)


def test_dynamic_doubles():
    assert steps(big(Dynamic, 2048), [0, 1, 16, 17, 32, 33, 65, 1025, 2048]) == [0, 16, 16, 32, 32, 64, 128, 2048, 2048]
    assert steps(big(Dynamic, 100), [64, 65, 100]) == [64, 112, 112]  # no more than the longest can use
    assert steps(big(Dynamic, 2048, block_tokens=48), [1, 49, 97]) == [48, 96, 192]


@CONTIGUOUS
def test_a_sequence_is_one_run_that_stays_where_it_is(name):
    cache = make(name, blocks=80)
    first, second = cache.allocate(), cache.allocate()
    tables = [cache.append([first, second], counts).block_tables[0] for counts in ([1, 1], [300, 5], [200, 400])]
    assert all(np.array_equal(table, tables[0]) for table in tables)
    assert tables[0].shape == (2, 1)
    _, k, v = cache._layers[0]
    assert k.shape[2] * 16 == cache.block_tokens >= MAX_TOKENS
    assert k[0, 0].flags.c_contiguous
    assert v[0, 0].flags.c_contiguous


@LINUX
@CONTIGUOUS
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pages_are_those_that_were_written(name, kind):
    """Each run of a head takes what its tokens take, to the page; what is truncated goes back."""
    cache = make(name, kind, blocks=40)
    per_token, page = shape(kind).bytes_per_token, page_tokens(shape(kind))

    def pages(*lengths):
        return sum(-(-length // page) * page for length in lengths) * per_token

    first, second = cache.allocate(), cache.allocate()
    fill(cache, first, 1, kind)
    assert resident_bytes(cache) == pages(1)
    fill(cache, first, 3 * page, kind)
    fill(cache, second, 5 * page + 3, kind)
    assert resident_bytes(cache) == pages(3 * page + 1, 5 * page + 3) <= cache.stats().used_bytes
    fork = cache.fork(second)
    assert resident_bytes(cache) == pages(3 * page + 1, 5 * page + 3, 5 * page + 3)
    cache.truncate(second, 1)
    assert resident_bytes(cache) == pages(3 * page + 1, 1, 5 * page + 3) <= cache.stats().used_bytes
    cache.free(fork)
    assert resident_bytes(cache) == pages(3 * page + 1, 1)
    cache.free(first)
    cache.free(second)
    assert resident_bytes(cache) == 0


def test_more_regions_than_there_is_address_space():
    """Then a sequence takes a greater part of the budget, so that the budget is what is reached first."""
    longest = 1 << 22
    shape = CacheShape(64, 8, 128, BF16, longest)
    cache = Dynamic(shape, 2 * longest * shape.bytes_per_token, OperatorConfig())
    assert cache.num_blocks * cache.block_bytes <= ADDRESS_SPACE
    assert cache.tokens_needed(1) * cache.num_blocks <= cache.stats().capacity_tokens
    assert cache.tokens_needed(1) > 16
    sequences = [cache.allocate() for _ in range(cache.num_blocks)]
    cache.append(sequences, [1] * len(sequences))
    assert cache.tokens_needed(longest) == longest


def test_memory_reads_as_zeros_and_forgets():
    memory = Memory(8 * PAGE, huge_pages=False)
    memory.bytes[:] = 7
    memory.release(2 * PAGE, 5 * PAGE)
    assert memory.bytes.reshape(8, PAGE).max(axis=1).tolist() == [7, 7, 0, 0, 0, 7, 7, 7]
    assert not Memory(1 << 20, huge_pages=True).bytes.any()
    with pytest.raises(MemoryError, match="no address space for the cache's"):
        Memory(1 << 60, huge_pages=False)
