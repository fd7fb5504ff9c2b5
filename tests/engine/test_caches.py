"""Every cache gives a model the same bits: answers through the engine, and logits through a life of one sequence."""

from itertools import combinations

import numpy as np
import pytest

from pace import LLM, SamplingParams
from pace.cache import CACHES
from pace.ops import OperatorConfig
from tests.kernels.arrays import threads

from .fakes import VOCABULARY, write_model
from .test_engine import answers, requests, with_engine

# What every other layer sees.
MODELS = {
    "full": {},
    "window and sinks": {"window": 20, "sinks": np.array([0.0, -1.0, 2.0, 0.5, -np.inf, 0.0], np.float32)},
}

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


@pytest.fixture(scope="module", params=MODELS)
def load(request, path):
    """An LLM of the model, with whatever is its own."""

    def load(*args):
        llm = LLM(path, *args)
        for layer in llm.model.layers[::2]:
            vars(layer.attention).update(MODELS[request.param])
        return llm

    return load


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llms(request, load):
    """One for each cache and block size."""
    return {
        (name, block_tokens): load(request.param, 16 << 20, name, block_tokens)
        for name in CACHES
        for block_tokens in (None, 16)
    }


def test_answers(llms, rung):
    """Of prompts whole and in pieces, alone and among 32 of mixed lengths, on one thread and on two."""
    known = None
    prompts, params = requests()
    for which, llm in llms.items():
        for max_batch_tokens, count in ((1024, 1), (1024, 2), (37, 2)):
            llm.cache = CACHES[which[0]](
                llm.model.cache_shape, 16 << 20, OperatorConfig(), which[1]
            )  # knows no prompts
            with_engine(llm, max_batch_tokens=max_batch_tokens)
            with threads(count):
                given = answers(llm.generate(prompts, params))
            known = known or given
            assert given == known, (which, max_batch_tokens, count)
        with_engine(llm)
        for i in range(0, len(prompts), 5):
            assert answers(llm.generate([prompts[i]], params[i])) == known[i : i + 1], which
        assert llm.cache.stats().used_bytes == 0


def test_a_prompt_that_begins_like_an_earlier_one(load, rung):
    """PAGED computes only what it does not have; the answer is the same."""
    llm = load("bfloat16", 16 << 20, "PAGED", 16)
    prompt = [3 + i % 50 for i in range(100)]
    first = answers(llm.generate([prompt], GREEDY))
    assert llm.cache.stats().prefix_hits == 0
    assert answers(llm.generate([prompt], GREEDY)) == first
    assert (llm.cache.stats().prefix_hits, llm.cache.stats().prefix_tokens) == (1, 96)
    plain = load("bfloat16", 16 << 20, "SLAB_POOL")
    assert answers(plain.generate([[*prompt[:50], 7, 8]], GREEDY)) == answers(
        llm.generate([[*prompt[:50], 7, 8]], GREEDY)
    )
    assert llm.cache.stats().prefix_tokens == 96 + 48
    assert llm.cache.stats().used_bytes == 0


def test_more_than_the_cache_holds_at_once(load, llms, rung):
    """Who is admitted has room to the end, however a cache rounds up."""
    prompts, params = requests()
    expected = answers(next(iter(llms.values())).generate(prompts, params))
    dtype = str(next(iter(llms.values())).model.dtype)
    for name in CACHES:
        least = llms[name, 16].cache.tokens_needed(312) * llms[name, 16].model.cache_shape.bytes_per_token
        small = load(dtype, least, name, 16)
        assert answers(small.generate(prompts, params)) == expected
        assert small.cache.stats().used_bytes == 0


def life(llm, cache):
    """Logits of a prompt in pieces, of two forks of it that go on beside another sequence, and after truncations."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 400).astype(np.int32)
    found = []

    def forward(*pieces):
        """Pieces: a sequence and the slice of `tokens` that it goes on with."""
        placement = cache.append([sequence for sequence, _ in pieces], [len(tokens[part]) for _, part in pieces])
        hidden = llm.model.forward(np.concatenate([tokens[part] for _, part in pieces]), placement, cache)
        found.append(llm.model.logits(hidden))

    first, other = cache.allocate(), cache.allocate()
    for part in (slice(0, 7), slice(7, 100), slice(100, 101)):
        forward((first, part))
    fork = cache.fork(first)
    forward((fork, slice(200, 240)), (other, slice(50, 90)), (first, slice(101, 102)))
    cache.truncate(first, 40)
    cache.truncate(fork, 130)
    for step in range(3):
        forward(*((sequence, slice(300 + step, 301 + step)) for sequence in (other, first, fork)))
    cache.free(other)
    again = cache.fork(first)
    forward((again, slice(250, 400)), (fork, slice(10, 11)))
    cache.truncate(again, 0)
    forward((again, slice(0, 101)))
    assert np.array_equal(found[-1][-1:], found[2])  # what a prompt gave in pieces, and gives whole
    return found


def test_models_differ(path):
    """Each of what a layer may be given counts."""
    tokens = np.arange(3, 103, dtype=np.int32)
    given = [{}, {"window": 20}, {"sinks": np.zeros(6, np.float32)}, {"softcap": 1.0}]
    found = []
    for limits in given:
        llm = LLM(path, "float32", 16 << 20)
        for layer in llm.model.layers[::2]:
            vars(layer.attention).update(limits)
        placement = llm.cache.append([llm.cache.allocate()], [len(tokens)])
        found.append(llm.model.logits(llm.model.forward(tokens, placement, llm.cache)[-1:]))
    assert all(not np.array_equal(a, b) for a, b in combinations(found, 2))


def test_logits(llms, rung):
    lives = {}
    for which, llm in llms.items():
        shape = llm.model.cache_shape
        for count in (1, 2):
            cache = CACHES[which[0]](shape, 1500 * shape.bytes_per_token, OperatorConfig(), which[1])
            with threads(count):
                lives[(*which, count)] = life(llm, cache)
    expected = lives["SLAB_POOL", None, 1]
    for which, logits in lives.items():
        assert all(np.array_equal(a, b) for a, b in zip(logits, expected, strict=True)), which
