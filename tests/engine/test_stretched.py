"""Texts whose rotary positions follow their length: the same bits in every life, and the positions that are right.

Dynamic scaling has a token's frequencies follow the text when the token is new to it; longrope has all of a text
computed anew when it grows beyond what the model was trained on.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace import LLM, SamplingParams
from pace.cache import CACHES
from pace.ops import OperatorConfig
from tests.models.parity import longrope

from .fakes import VOCABULARY, greedy, write_model
from .test_scheduling import CASES, LIMITS, arrivals_of, by_themselves, life, make_engine, run, seen

TRAINED = 40
KINDS = {
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 16.0},
        "max_position_embeddings": TRAINED,
    },
    "longrope": {"rope_parameters": longrope(12, TRAINED), "max_position_embeddings": 640},
}


def asked():
    """Prompts below, at and beyond TRAINED, many of which begin alike; some grow beyond it."""
    generator = np.random.default_rng(0)
    begun = generator.integers(3, VOCABULARY, 80).tolist()
    kinds = [{"temperature": 0}, {"temperature": 1.0, "n": 3}, {"temperature": 0.7, "prompt_logprobs": 1}]
    return [
        (begun[:length], SamplingParams(**kinds[i % 3], seed=i, max_tokens=10, logprobs=1, ignore_eos=True))
        for i, length in enumerate((5, 31, 33, 35, 38, 39, 40, 41, 42, 60, 64, 79) * 3)
    ]


ASKED = asked()


@pytest.fixture(scope="module", params=KINDS)
def llm(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("stretched")
    write_model(path, **KINDS[request.param])
    return LLM(path, dtype="bfloat16", kv_cache_bytes=16 << 20)


@pytest.fixture(scope="module")
def alone(llm):
    return by_themselves(llm, ASKED)


@pytest.mark.parametrize(("cache", "prefix_caching"), CASES)
@settings(max_examples=6, deadline=None)
@given(
    arrivals=arrivals_of(ASKED),
    chunk=st.sampled_from([1, 7, 16, 37, 512]),
    **LIMITS,
)
def test_as_if_alone(llm, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve):
    life(llm, ASKED, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve)


def logits_of(llm, ids, lengths):
    """Of a text's tokens, each as part of a text of so many, in one forward pass."""
    shape = llm.model.cache_shape
    cache = CACHES["DYNAMIC"](shape, 512 * shape.bytes_per_token, OperatorConfig())
    placement = cache.append([cache.allocate()], [len(ids)])
    placement = replace(placement, text_lengths=np.array(lengths, np.int32))
    return llm.model.logits(llm.model.forward(np.array(ids, np.int32), placement, cache))


@pytest.mark.parametrize("prompt", [38, 60])
def test_the_positions_of_a_text(llm, prompt):
    """By one pass over all of it: log-probabilities are equal to the last bit."""
    engine = make_engine(llm, "PAGED", 1 << 10)
    request = engine.intake.request(ASKED[11][0][:prompt], greedy(max_tokens=12, logprobs=0, ignore_eos=True))
    run(engine, [request])
    (output,) = request.output().outputs
    ids = request.prompt_token_ids + output.token_ids
    for at, logprobs in enumerate(output.logprobs):
        known = prompt + at  # tokens of which the next is drawn
        if llm.model.stretched_whole:
            lengths = [known] * known
        else:
            lengths = [max(prompt, position + 1) for position in range(known)]
        row = logits_of(llm, ids[:known], lengths)[-1].astype(np.float64)
        (value,) = logprobs.values()
        assert np.argmax(row) == ids[known]
        # Float32 logits of one model: what differs is the sum of the softmax alone.
        assert value.logprob == pytest.approx(row.max() - np.log(np.exp(row - row.max()).sum()) - row.max(), abs=1e-5)
    assert known > TRAINED


def test_a_text_that_grows_beyond_is_no_preemption(llm):
    engine = make_engine(llm, "PAGED", 1 << 10)
    request = engine.intake.request(ASKED[11][0][:39], greedy(max_tokens=12, ignore_eos=True))
    run(engine, [request])
    stats = engine.stats()
    assert (stats.preemptions, stats.cached_tokens, stats.finished) == (0, 0, {"length": 1})
    assert request.output().usage.prompt_tokens == 39


def test_prefixes_are_shared_by_texts_of_the_same_positions(llm):
    """With longrope all that are long; with dynamic scaling those of one length; never a long and a short one."""
    engine = make_engine(llm, "PAGED", 1 << 10)
    text = ASKED[11][0]

    def cached(length):
        request = engine.intake.request(text[:length], greedy(max_tokens=1))
        run(engine, [request])
        return request.output().usage.cached_tokens

    whole = llm.model.stretched_whole
    assert cached(36) == 0
    assert cached(34) == 32
    assert cached(70) == 0
    assert cached(60) == (48 if whole else 0)
    assert cached(70) == 64
    assert cached(35) == 32


def test_the_texts_of_one_prompt_grow_beyond_one_by_one(llm, alone):
    engine = make_engine(llm, "SLAB_POOL", 1 << 10)
    requests = [engine.intake.request(*ASKED[which]) for which in range(1, len(ASKED), 3)]
    run(engine, requests)
    assert [seen(request) for request in requests] == alone[1::3]
