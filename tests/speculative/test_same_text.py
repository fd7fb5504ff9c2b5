"""With every proposer and every cache, texts are what they are without: tokens, log-probabilities, ends, and all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace import SamplingParams
from pace.cache import CACHES
from pace.engine.structured import StructuredOutputsParams
from pace.speculative import PROPOSERS
from tests.engine.fakes import EOS, Scripted, word
from tests.engine.test_scheduling import ASKED, LIMITS, arrivals_of, by_themselves, life, run, seen

from .conftest import PARD_TOKEN
from .proposers import draft_of, make_engine

# How drafts are made, and the draft model: the target in another dtype, or one that says other things.
METHODS = {
    "ngram": ({"method": "ngram", "shortest": 1}, None),
    "alike": ({"method": "draft_model", "model": "alike", "num_tokens": 5, "cache": "PAGED"}, "alike"),
    "other": ({"method": "draft_model", "model": "other", "num_tokens": 3}, "other"),
    "pard": ({"method": "pard", "model": "alike", "num_tokens": 6}, "alike"),
    "pard of another": ({"method": "pard", "model": "other", "num_tokens": 33, "cache": "SLAB_POOL"}, "other"),
    "adaptive": ({"method": "pard", "model": "alike", "num_tokens": 4, "adaptive": True}, "alike"),
    "liar": ({"method": "liar"}, None),
    "wild": ({"method": "wild", "num_tokens": 4}, None),
    "failing": ({"method": "failing"}, None),
    "knowing": ({"method": "knowing"}, None),
}
CASES = [(name, None) for name in CACHES] + [("SLAB_POOL", True)]


def test_every_proposer_is_tried():
    assert {config["method"] for config, _ in METHODS.values()} == set(PROPOSERS)


@pytest.fixture(scope="module")
def alone(llm):
    """What each request gives by itself, without drafts."""
    return by_themselves(llm, ASKED)


@pytest.fixture(scope="module")
def knows(alone):
    """All that is ever said."""
    return [prompt + text[0] for texts, _, prompt in alone for text in texts]


@pytest.fixture(params=METHODS)
def speculating(request, knows, monkeypatch):
    """How to make an engine that has drafts."""
    config, name = METHODS[request.param]
    draft = None if name is None else draft_of(request.getfixturevalue(name), pard_token=PARD_TOKEN)
    monkeypatch.setattr(PROPOSERS["knowing"], "knows", knows)

    def make(llm, cache, capacity, prefix_caching=None, **limits):
        speculative = {"adaptive": False} | config
        return make_engine(llm, cache, capacity, prefix_caching, speculative, draft, **limits)

    make.name = request.param
    return make


@pytest.mark.parametrize(("cache", "prefix_caching"), CASES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    arrivals=arrivals_of(ASKED),
    chunk=st.sampled_from([1, 2, 7, 16, 37, 64, 512]),
    **LIMITS,
)
def test_lives(llm, alone, speculating, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve):
    """With chunks, cancellations, preemption, n, best_of, penalties, stop strings and log-probabilities."""
    life(llm, ASKED, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve, speculating)


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "prefix_caching"), CASES)
@settings(max_examples=200, deadline=None)
@given(
    arrivals=arrivals_of(ASKED),
    chunk=st.integers(1, 512),
    **LIMITS,
)
def test_many_lives(llm, alone, speculating, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve):
    life(llm, ASKED, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve, speculating)


def test_all_at_once(llm, alone, speculating):
    """That there are drafts at all, and what comes of them."""
    engine = speculating(llm, "PAGED", 1 << 12)
    requests = [engine.intake.request(*each) for each in ASKED]
    run(engine, requests)
    assert [seen(request) for request in requests] == alone
    stats = engine.stats().speculation
    assert stats.verifications <= stats.drafted
    for name in ("drafted", "accepted", "verifications"):
        assert getattr(stats, name) == sum(getattr(request.metrics, name) for request in requests)
    tokens = sum(request.num_output_tokens for request in requests)
    assert stats.accepted < tokens
    if speculating.name in ("knowing", "alike"):
        assert stats.acceptance_rate > 0.5  # where there are penalties, it is less
        assert stats.mean_accepted_length > 2.5
    if speculating.name in ("pard", "ngram"):
        assert stats.accepted > 0
    if speculating.name == "liar":
        assert stats.acceptance_rate < 0.05
    assert stats.drafted > (10 if speculating.name == "failing" else 100) or speculating.name == "adaptive"


def test_preemption(llm, alone, speculating):
    """Where it has to happen: it takes drafts along, and nobody notices."""
    engine = speculating(llm, "PAGED", 256, reserve_tokens=0)
    requests = [engine.intake.request(*ASKED[which]) for which in range(2, len(ASKED), 3)]
    run(engine, requests)
    assert engine.stats().preemptions > 0
    assert [seen(request) for request in requests] == alone[2::3]


def test_whose_drafts_find_no_room(llm, speculating):
    """Nobody is preempted for drafts: where there is room for all without, there is with."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompts = [[5 + i, 6, 5 + i, 6] for i in range(3)]

    def outputs(make, **more):
        # Two blocks of 16 and a few tokens each, and not one block more.
        engine = make(llm, "PAGED", 3 * 48, prefix_caching=False, reserve_tokens=30, **more)
        requests = [engine.intake.request(prompt, params) for prompt in prompts]
        run(engine, requests)
        assert engine.stats().preemptions == 0
        return [seen(request) for request in requests]

    assert outputs(speculating) == outputs(make_engine)


ENDINGS = [
    {"stop": ["ab"]},
    {"stop": ["ab"], "include_stop_str_in_output": True},
    {"stop": ["bwx"], "min_tokens": 6},
    {"stop_token_ids": [word("hello")]},
    {"min_tokens": 9},
    {"bad_words": ["ab", "hello world"]},
    {"max_tokens": 2},
    {"max_tokens": 5},
    {"ignore_eos": True, "max_tokens": 33},
    {"repetition_penalty": 1.4, "ignore_eos": True},
    {"logit_bias": {word("ab"): -100.0}, "presence_penalty": 0.4, "ignore_eos": True},
    {"logprobs": 3, "ignore_eos": True},
    {"prompt_logprobs": 1, "logprobs": 0},
    {"structured_outputs": StructuredOutputsParams(regex="(ab|wxyz|hello){3,8}")},
    {"structured_outputs": StructuredOutputsParams(choice=["hello world", "hello"]), "temperature": 1.0, "seed": 3},
    {"temperature": 1.3, "seed": 9, "top_k": 4},
    {"temperature": 0.7, "seed": 9, "n": 3},
]
SCRIPT = [word(each) for each in ("hello", "ab", "wxyz", "hello", "ab", " world", "hello", "ab", "wxyz")] + [70, EOS]


def test_ends_at_the_exact_token(llm, speculating, monkeypatch):
    """Of a text that is known, each way to end it, in the middle of drafts and of tokens."""
    script = Scripted(SCRIPT, llm.model.dtype)
    plain_llm = type("", (), {"model": script, "tokenizer": llm.tokenizer})
    prompt = [word("hello")]
    monkeypatch.setattr(PROPOSERS["knowing"], "knows", [prompt + SCRIPT * 4])
    params = [SamplingParams(**({"temperature": 0, "max_tokens": 25} | ending)) for ending in ENDINGS]

    def outputs(make):
        engine = make(plain_llm, "SLAB_POOL", 1 << 12)
        requests = [engine.intake.request(prompt, each) for each in params]
        run(engine, requests)
        return [seen(request) for request in requests], [request.metrics.mean_accepted_length for request in requests]

    (expected, _), (given, lengths) = outputs(make_engine), outputs(speculating)
    assert given == expected
    if speculating.name == "knowing":
        assert np.median([length for length in lengths if length]) > 5


def test_what_a_stream_shows(directory, speculating, llm, monkeypatch):
    """Several tokens at a time, and all the same text; a reader who leaves, leaves nothing behind."""
    from pace import LLM

    streamed = LLM(directory, dtype="bfloat16", kv_cache_bytes=4 << 20)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = streamed.generate([[5, 6, 7]], params)[0].outputs[0]
    monkeypatch.setattr(PROPOSERS["knowing"], "knows", [[5, 6, 7, *expected.token_ids]])
    streamed.engine = speculating(llm, "SLAB_POOL", 1 << 12)
    outputs = list(streamed.stream([5, 6, 7], params))
    assert "".join(output.outputs[0].new_text for output in outputs) == expected.text
    assert outputs[-1].outputs[0].token_ids == expected.token_ids
    if speculating.name in ("knowing", "alike"):
        assert len(outputs) < 20
    for _ in zip(range(2), streamed.stream([5, 6, 7], params), strict=False):
        pass
    assert streamed.engine.cache.stats().used_tokens == 0
    assert not streamed.engine.scheduler.running


@pytest.mark.parametrize("where", ["forward", "logits"])
def test_a_step_that_is_interrupted(llm, alone, speculating, where, monkeypatch):
    """Ctrl-C anywhere, in the target and in the draft model: as if the step had not begun."""
    engine = speculating(llm, "PAGED", 1 << 12)
    requests = [engine.intake.request(*each) for each in ASKED[:9]]
    for request in requests:
        engine.add(request)
    proposer = engine.scheduler.speculation.proposer
    models = [llm.model] + ([proposer.model] if hasattr(proposer, "model") else [])
    chances = np.random.default_rng(0)

    def interrupted(function):
        def call(*args, **kwargs):
            if chances.random() < 0.1:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    for model in models:
        monkeypatch.setattr(model, where, interrupted(getattr(model, where)))
    interruptions = 0
    for _ in range(2000):
        try:
            engine.step()
        except KeyboardInterrupt:
            interruptions += 1
            continue
        if not engine.busy:
            break
    assert interruptions > 2
    assert [seen(request) for request in requests] == alone[:9]
    assert engine.cache.stats().used_tokens == 0
    if hasattr(proposer, "cache"):
        assert proposer.cache.stats().used_tokens == 0


@pytest.mark.parametrize("where", ["forward", "logits"])
def test_a_step_that_raises(llm, alone, speculating, monkeypatch, where):
    """While there are drafts: its texts end with the reason, and what comes after is as ever."""
    engine = speculating(llm, "PAGED", 1 << 12)
    first = [engine.intake.request(*each) for each in ASKED[:9]]
    for request in first:
        engine.add(request)
    for _ in range(3):
        engine.step()

    def broken(*arguments, **named):
        raise ArithmeticError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(llm.model, where, broken)
        while engine.busy:
            engine.step()
    ends = {text.finish_reason for request in first for text in request.sequences}
    assert "error" in ends
    later = [engine.intake.request(*each) for each in ASKED[:9]]
    run(engine, later)
    assert [seen(request) for request in later] == alone[:9]
    assert engine.cache.stats().used_tokens == 0


def test_a_step_that_fails(llm, alone, speculating, monkeypatch):
    """Ends its own, and what comes after is as ever."""
    engine = speculating(llm, "PAGED", 1 << 12)
    first = [engine.intake.request(*each) for each in ASKED[2:5]]
    for request in first:
        engine.add(request)
    for _ in range(2):
        engine.step()
    logits = llm.model.logits
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "logits", lambda hidden: logits(hidden) * np.nan)
        while engine.busy:
            engine.step()
    later = [engine.intake.request(*each) for each in ASKED[:9]]
    run(engine, later)
    assert [seen(request) for request in later] == alone[:9]
    assert engine.cache.stats().used_tokens == 0
