"""What a request gets does not depend on when it came, who else was there, or what became of them.

Random arrivals, lengths, cancellations, priorities and chunk sizes in caches that are too small for all: each request
that ends gives the tokens and log-probabilities that it gives alone, nothing is left behind, and everything ends.
"""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace import LLM, SamplingParams
from pace.cache import CACHES, CacheFull
from pace.engine.config import EngineConfig
from pace.engine.engine import Engine, QueueFull
from pace.engine.structured import StructuredOutputsParams
from pace.ops import OperatorConfig

from .fakes import EOS, VOCABULARY, scripted, word, write_model

PROMPTS = 12
LONGEST = 90  # a prompt and what is written, in tokens
KINDS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "typical_p": 0.95},
    {"temperature": 1.5, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 1.2, "min_p": 0.02, "presence_penalty": 0.5, "logit_bias": {70: 3.0, 80: -100.0}},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0, "prompt_logprobs": 2},
    {"temperature": 1.0, "n": 2, "best_of": 4, "stop": ["ab"], "min_tokens": 1},
]


def asked():
    """Requests that are alike in no way: half of the prompts begin as another does."""
    generator = np.random.default_rng(0)
    begun = generator.integers(3, VOCABULARY, 70).tolist()
    prompts = [generator.integers(3, VOCABULARY, n).tolist() for n in (1, 2, 15, 17, 40, 70)]
    prompts += [begun[:n] + generator.integers(3, VOCABULARY, 2).tolist() for n in (16, 30, 33, 48, 65, 66)]
    assert len(prompts) == PROMPTS
    return [
        (prompt, SamplingParams(**KINDS[(i + j) % len(KINDS)], seed=i, max_tokens=1 + 3 * j, logprobs=1))
        for i, prompt in enumerate(prompts)
        for j in (0, 2, 5)
    ]


ASKED = asked()


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return LLM(path, dtype="bfloat16", kv_cache_bytes=16 << 20)


def seen(request):
    """All that a user gets to see of a request but when."""
    output = request.output()
    texts = [
        (text.token_ids, text.logprobs, text.cumulative_logprob, text.text, text.finish_reason, text.stop_reason)
        for text in output.outputs
    ]
    return texts, output.prompt_logprobs, output.prompt_token_ids


@pytest.fixture(scope="module")
def alone(llm):
    return by_themselves(llm, ASKED)


def by_themselves(llm, asked):
    """What each request gives in a cache of its own."""
    found = []
    for prompt, params in asked:
        engine = make_engine(llm, "DYNAMIC", 1 << 12)
        request = engine.intake.request(prompt, params)
        run(engine, [request])
        found.append(seen(request))
    return found


def make_engine(llm, cache, capacity, prefix_caching=None, **limits):
    shape = llm.model.cache_shape
    kv_cache = CACHES[cache](shape, capacity * shape.bytes_per_token, OperatorConfig(), 16, prefix_caching)
    return Engine(llm.model, kv_cache, llm.tokenizer, EngineConfig(**limits), generation_config={"eos_token_id": EOS})


def run(engine, requests):
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        assert steps < 20000, "it does not end"


def arrivals_of(asked):
    return st.lists(
        st.tuples(
            st.integers(0, len(asked) - 1),  # which
            st.integers(0, 12),  # steps before the next one comes
            st.integers(-1, 1),  # priority
            st.none() | st.integers(0, 25),  # cancelled after so many steps
        ),
        min_size=1,
        max_size=24,
    )


# Of a life: blocks beyond what the longest request needs, and the engine's.
LIMITS = {
    "room": st.integers(0, 6),
    "sequences": st.sampled_from([1, 3, 256]),
    "policy": st.sampled_from(["prefill_first", "decode_first"]),
    "reserve": st.sampled_from([0, 1, 64]),
}
CASES = [(name, None) for name in CACHES] + [("SLAB_POOL", True), ("PAGED", False)]


@pytest.mark.parametrize(("cache", "prefix_caching"), CASES)
@settings(max_examples=25, deadline=None)
@given(
    arrivals=arrivals_of(ASKED),
    chunk=st.sampled_from([1, 2, 7, 16, 37, 64, 512]) | st.integers(1, 512),
    **LIMITS,
)
def test_as_if_alone(llm, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve):
    life(llm, ASKED, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve)


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "prefix_caching"), CASES)
@settings(max_examples=600, deadline=None)
@given(
    arrivals=arrivals_of(ASKED),
    chunk=st.integers(1, 512),
    **LIMITS,
)
def test_many_lives(llm, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve):
    life(llm, ASKED, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve)


def life(
    llm, asked, alone, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve, make_engine=make_engine
):
    """asked: prompts with their parameters, of which arrivals name some; alone: what each gives by itself."""
    least = make_engine(llm, cache, 1 << 12).cache.tokens_needed(LONGEST)
    engine = make_engine(
        llm, cache, least + 16 * room, prefix_caching, policy=policy, max_batch_tokens=chunk,
        max_sequences=sequences, reserve_tokens=reserve,
    )  # fmt: skip
    live, doomed, come, step = [], [], [], 0
    pending = list(arrivals)
    next_at = 0
    while pending or engine.busy:
        while pending and step >= next_at:
            which, wait, priority, cancelled_after = pending.pop(0)
            request = engine.intake.request(*asked[which], priority=priority)
            engine.add(request)
            come.append((which, request))
            if cancelled_after is not None:
                doomed.append((step + cancelled_after, request))
            next_at = step + wait
        for at, request in doomed:
            if at == step:
                engine.cancel(request)
        told = engine.step()
        assert len(set(told)) == len(told)
        live += told
        step += 1
        assert step < 20000, "it does not end"
    for which, request in come:
        assert request.finished
        texts, *rest = seen(request)
        if "cancelled" not in [text.finish_reason for text in request.sequences]:
            assert (texts, *rest) == alone[which]
        elif request.params.best_of is None:  # what there is by then is how it begins
            for text, whole in zip(texts, alone[which][0], strict=True):
                assert text[0] == whole[0][: len(text[0])]
                assert text[1] == whole[1][: len(text[1])]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache.used_bytes, stats.cache.used_tokens) == (0, 0, 0, 0)
    assert sum(stats.finished.values()) == stats.requests == len(arrivals)
    everything = engine.cache.allocate()  # nothing leaked: it can all be had again
    engine.cache.append([everything], [min(stats.cache.capacity_tokens, 512)])
    return engine


@pytest.mark.parametrize("cache", ["SLAB_POOL", "PAGED"])
def test_a_tiny_cache_preempts_and_nobody_notices(llm, alone, cache):
    """That the lives above see preemption at all: here it has to happen."""
    engine = make_engine(llm, cache, 256, reserve_tokens=0)
    requests = [engine.intake.request(*ASKED[which]) for which in range(2, len(ASKED), 3)]
    run(engine, requests)
    assert engine.stats().preemptions > 0
    assert [seen(request) for request in requests] == alone[2::3]


@pytest.mark.parametrize("cache", CACHES)
def test_growing_past_a_step_preempts_and_nobody_notices(llm, cache):
    """Contiguous caches grow by whole pages: two that cross that boundary, where there is room for one to."""
    step = make_engine(llm, cache, 1 << 12).cache.tokens_needed(1)
    prompts = [[5 + i] * (-(-200 // step) * step - 3) for i in range(2)]
    params = SamplingParams(max_tokens=20, temperature=0, logprobs=1, ignore_eos=True)
    expected = []
    for prompt in prompts:
        engine = make_engine(llm, cache, 1 << 12)
        expected.append(engine.intake.request(prompt, params))
        run(engine, expected[-1:])
    capacity = 2 * engine.cache.tokens_needed(len(prompts[0])) + step
    engine = make_engine(llm, cache, capacity, reserve_tokens=0)
    requests = [engine.intake.request(prompt, params) for prompt in prompts]
    run(engine, requests)
    assert engine.stats().preemptions == 1
    assert list(map(seen, requests)) == list(map(seen, expected))


def test_the_first_come_are_kept_when_the_cache_runs_out(llm):
    engine = make_engine(llm, "SLAB_POOL", 64, reserve_tokens=0)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    first, second = (engine.intake.request([5 + i] * 8, params) for i in range(2))
    for request in (first, second):
        engine.add(request)
    while not first.finished:
        engine.step()
        assert first.sequences[0].slot is not None or first.finished
    assert engine.stats().preemptions == 1
    while not second.finished:
        engine.step()
    assert engine.stats().preemptions == 1


def test_a_decode_waits_for_no_more_than_a_chunk(llm):
    """Every step brings a token to whoever decodes, and takes no more of a prompt than a chunk."""
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_batch_tokens=32)
    short = engine.intake.request([5], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    engine.add(short)
    engine.step()
    long = engine.intake.request([6] * 300, SamplingParams(max_tokens=1, temperature=0))
    engine.add(long)
    steps, before = 0, short.num_output_tokens
    while not long.finished:
        computed = long.sequences[0].computed
        told = engine.step()
        steps += 1
        assert short in told
        assert short.num_output_tokens == before + steps
        assert long.sequences[0].computed - computed <= 31
    assert steps == -(-300 // 31)


def test_prompts_go_through_the_model_together(llm, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_batch_tokens=100)
    batches = []
    forward = llm.model.forward
    monkeypatch.setattr(
        llm.model, "forward", lambda *args: batches.append(np.diff(args[1].starts).tolist()) or forward(*args)
    )
    run(engine, [engine.intake.request([5] * n, SamplingParams(max_tokens=3, ignore_eos=True)) for n in (30, 50, 60)])
    # Those whose prompt is through go on beside the rest of the third.
    assert batches == [[30, 50, 20], [1, 1, 40], [1, 1, 1], [1]]


def test_priorities(llm):
    """The lower number first, and of equals who came first; who waits is overtaken, who runs makes room."""
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_sequences=1)
    ends = []
    requests = {}
    for name, priority in (("a", 1), ("b", 1), ("c", 0), ("d", 2), ("e", 0)):
        requests[name] = engine.intake.request([5], params, priority=priority, request_id=name)
        engine.add(requests[name])
        if name == "a":
            engine.step()
    while engine.busy:
        ends += [request.id for request in engine.step() if request.finished]
    assert ends == ["c", "e", "a", "b", "d"]
    assert engine.stats().preemptions == 1


def test_nobody_makes_room_that_is_not_enough(llm):
    engine = make_engine(llm, "SLAB_POOL", 160, reserve_tokens=0)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    equal = engine.intake.request([5] * 70, params)
    lower = engine.intake.request([6] * 20, params, priority=5)
    engine.add(equal)
    engine.add(lower)
    engine.step()
    engine.add(engine.intake.request([7] * 100, params))  # has to wait for the first in any case
    engine.step()
    assert engine.stats().running == 2
    engine.add(engine.intake.request([7] * 60, params, priority=-1))  # without the last there is room
    engine.step()
    assert [text.slot is None for text in (*equal.sequences, *lower.sequences)] == [False, True]
    run(engine, [])


def test_a_queue_has_limits(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_waiting=2)
    params = SamplingParams(max_tokens=2)
    taken = [engine.intake.request([5, 6], params) for _ in range(2)]
    for request in taken:
        engine.add(request)
    with pytest.raises(QueueFull, match="2 requests wait, and max_waiting is 2: try again later"):
        engine.add(engine.intake.request([5], params))
    engine.step()
    engine.add(engine.intake.request([5], params))  # those two run
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_waiting_tokens=10)
    engine.add(engine.intake.request([5] * 20, params))  # alone it may be longer than that
    with pytest.raises(QueueFull, match="20 tokens of prompts wait, and max_waiting_tokens is 10: no room for 1 more"):
        engine.add(engine.intake.request([5], params))
    run(engine, [])
    assert engine.stats().requests == 1


def test_who_has_begun_is_not_in_the_queue(llm):
    """Neither the other texts of a request, nor who made room for somebody else."""
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_sequences=1, max_waiting=1, max_waiting_tokens=10)
    engine.add(engine.intake.request([5] * 8, SamplingParams(n=8, max_tokens=3), priority=1))
    engine.step()
    assert engine.stats().waiting == 7
    engine.add(engine.intake.request([5], SamplingParams(max_tokens=3)))
    engine.step()
    assert engine.stats().preemptions == 1
    engine.add(engine.intake.request([5], SamplingParams(max_tokens=3)))
    with pytest.raises(QueueFull, match="1 requests wait, and max_waiting is 1"):
        engine.add(engine.intake.request([5], SamplingParams(max_tokens=3)))
    run(engine, [])


def test_what_can_never_fit_is_refused_at_once(llm):
    engine = make_engine(llm, "SLAB_POOL", 64)
    per_token = llm.model.cache_shape.bytes_per_token
    with pytest.raises(
        ValueError, match=f"70 tokens do not fit the cache's 64: give kv_cache_bytes of {80 * per_token}"
    ):
        engine.intake.request([5] * 50, SamplingParams(max_tokens=20))
    assert engine.intake.request([5] * 50, SamplingParams(max_tokens=None)).sequences[0].max_tokens == 14


def counted(forward, computed, tokens, *rest):
    computed.append(len(tokens))
    return forward(tokens, *rest)


def test_texts_of_one_prompt_compute_it_once(llm):
    for cache, prefix_caching in CASES:
        engine = make_engine(llm, cache, 1 << 12, prefix_caching)
        request = engine.intake.request([5] * 60, SamplingParams(n=4, seed=1, max_tokens=5, ignore_eos=True))
        computed = []
        forward = llm.model.forward
        llm.model.forward = partial(counted, forward, computed)
        try:
            run(engine, [request])
        finally:
            del llm.model.forward
        assert sum(computed) == 60 + 3 + 4 * 4, cache  # the last token of the prompt again for each of the others
        texts = [text.token_ids for text in request.output().outputs]
        assert len({tuple(text) for text in texts}) == 4
        assert request.output().usage.completion_tokens == 20
        single = engine.intake.request([5] * 60, SamplingParams(seed=1, max_tokens=5, ignore_eos=True))
        run(engine, [single])
        assert single.output().outputs[0].token_ids == texts[0]


@pytest.mark.parametrize(("cache", "prefix_caching"), [("SLAB_POOL", False), ("PAGED", True), ("PAGED", False)])
def test_texts_of_one_prompt_need_room_for_it_once(llm, monkeypatch, cache, prefix_caching):
    """Forks are let in where there is no room for the prompt of each."""
    engine = make_engine(llm, cache, 176, prefix_caching, reserve_tokens=0)
    request = engine.intake.request([5] * 97, SamplingParams(n=4, seed=1, max_tokens=8, ignore_eos=True))
    computed = []
    monkeypatch.setattr(llm.model, "forward", partial(counted, llm.model.forward, computed))
    run(engine, [request])
    assert sum(computed) == 97 + 3 + 4 * 7
    assert engine.stats().preemptions == 0


def test_a_prompt_that_waits_is_not_looked_up_at_every_step(llm, monkeypatch):
    engine = make_engine(llm, "PAGED", 128)
    first = engine.intake.request([5] * 40, SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    second = engine.intake.request([6] * 60, SamplingParams(max_tokens=4, temperature=0))
    asked, original = [], engine.cache._beginning
    monkeypatch.setattr(engine.cache, "_beginning", lambda tokens: asked.append(len(tokens)) or original(tokens))
    run(engine, [first, second])
    assert asked.count(60) < 8
    assert second.finished


@pytest.mark.parametrize("cache", ["PAGED", "SLAB_POOL"])
def test_prefixes_are_found_again(llm, cache):
    engine = make_engine(llm, cache, 1 << 12, prefix_caching=True)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    prompt = list(range(5, 75))
    requests = [engine.intake.request([*prompt, n], params) for n in range(5, 9)]
    for request in requests:
        run(engine, [request])
    assert [request.output().usage.cached_tokens for request in requests] == [0, 64, 64, 64]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (4 * 71, 3 * 64)
    assert stats.prefix_hit_rate == pytest.approx(192 / 284)


def test_shared_prefixes_leave_room_for_more(llm):
    """Whoever begins as the living do needs little: all run at once where there is no room for all of their prompts."""
    engine = make_engine(llm, "PAGED", 160, reserve_tokens=0)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    first = engine.intake.request([9] * 70, params)
    engine.add(first)
    engine.step()
    for n in range(4):
        engine.add(engine.intake.request([9] * 64 + [5 + n], params))
    engine.step()
    assert engine.stats().running == 5
    run(engine, [])


# --- steps that go wrong ---


@pytest.mark.parametrize("where", ["forward", "logits"])
def test_a_step_that_raises_ends_its_batch_and_no_more(llm, monkeypatch, caplog, where):
    for cache, prefix_caching in CASES:
        engine = make_engine(llm, cache, 1 << 12, prefix_caching, max_sequences=2)
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        requests = [engine.intake.request([5 + i] * 40, params) for i in range(4)]
        expected = []
        for request in [engine.intake.request([5 + i] * 40, params) for i in range(4)]:
            run(engine, [request])
            expected.append(seen(request))
        engine = make_engine(llm, cache, 1 << 12, prefix_caching, max_sequences=2)
        for request in requests:
            engine.add(request)
        engine.step()

        def broken(*_):
            raise RuntimeError("the roof fell in")

        with monkeypatch.context() as patch:
            patch.setattr(llm.model, where, broken)
            assert engine.step() == requests[:2]
        assert [request.finished for request in requests] == [True, True, False, False]
        for request in requests[:2]:
            output = request.output().outputs[0]
            assert (output.finish_reason, output.stop_reason) == ("error", "RuntimeError: the roof fell in")
            assert len(output.token_ids) == 1
        assert "a step failed" in caplog.text
        run(engine, [])
        assert [seen(request) for request in requests[2:]] == expected[2:]
        again = [engine.intake.request([5 + i] * 40, params) for i in range(2)]
        run(engine, again)
        assert [seen(request) for request in again] == expected[:2]
        assert engine.stats().cache.used_bytes == 0
        assert engine.stats().finished == {"error": 2, "length": 4}


def test_a_text_that_breaks_ends_alone(llm, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    bad, good = (engine.intake.request([5, 6], params) for _ in range(2))

    def broken(_):
        raise RuntimeError("no such character")

    monkeypatch.setattr(bad.sequences[0].stream, "push", broken)
    run(engine, [bad, good])
    assert [r.output().outputs[0].finish_reason for r in (bad, good)] == ["error", "length"]
    assert bad.output().outputs[0].stop_reason == "no such character"
    assert engine.stats().cache.used_bytes == 0


def test_the_whole_request_ends_where_its_prompt_fails(llm, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)
    request = engine.intake.request([5] * 8, SamplingParams(n=3, seed=0, max_tokens=4))

    def broken(*_):
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr(llm.model, "forward", broken)
    run(engine, [request])
    assert [text.finish_reason for text in request.output().outputs] == ["error"] * 3


def test_somebody_else_holds_the_cache(llm):
    """A request for which there is no room though it is alone ends with the reason; the engine does not hang."""
    engine = make_engine(llm, "SLAB_POOL", 64)
    engine.cache.append([engine.cache.allocate()], [50])
    request = engine.intake.request([5] * 30, SamplingParams(max_tokens=4))
    run(engine, [request])
    assert "room for 32 more tokens is needed; 0 of 64 are free" in request.output().outputs[0].stop_reason
    with pytest.raises(CacheFull):
        engine.cache.append([engine.cache.allocate()], [30])


def test_the_end_of_one_text_of_many(llm):
    """Texts of one request end each on its own, and the request with the last."""
    scripted(llm, [word("hello"), EOS])
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)
    request = engine.intake.request([5], SamplingParams(n=3, temperature=0, max_tokens=9))
    run(engine, [request])
    output = request.output()
    assert [(text.index, text.text, text.finish_reason) for text in output.outputs] == [
        (i, "hello", "stop") for i in range(3)
    ]
    assert output.finished
    assert output.metrics.finished is not None


def test_somebody_else_holds_the_cache_of_many_texts(llm):
    engine = make_engine(llm, "SLAB_POOL", 64)
    engine.cache.append([engine.cache.allocate()], [50])
    request = engine.intake.request([5] * 30, SamplingParams(n=3, max_tokens=4))
    run(engine, [request])
    assert [text.finish_reason for text in request.sequences] == ["error"] * 3
    assert engine.stats().finished == {"error": 1}


def with_logits(llm, monkeypatch, change):
    """Whatever the model says, changed: change(logits) is called of each."""
    logits = llm.model.logits

    def changed(hidden):
        found = logits(hidden)
        change(found)
        return found

    monkeypatch.setattr(llm.model, "logits", changed)


def test_a_prompt_without_log_probabilities_ends_alone(llm, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_batch_tokens=8)

    def poison(logits):
        if len(logits) == 6:  # a chunk of the prompt's
            logits[2, 7] = np.nan

    good = engine.intake.request([5, 6], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    bad = engine.intake.request([6] * 12, SamplingParams(max_tokens=4, prompt_logprobs=2))
    with_logits(llm, monkeypatch, poison)
    engine.add(good)
    engine.add(bad)
    assert bad in engine.step()
    run(engine, [])
    assert [text.outputs[0].finish_reason for text in (good.output(), bad.output())] == ["length", "error"]
    assert bad.output().outputs[0].stop_reason == "the logits hold NaN or leave no token to draw"
    assert engine.stats().cache.used_bytes == 0


def test_nan_that_a_grammar_hides_ends_one_text(llm, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)

    def poison(logits):
        if len(logits) == 2:
            logits[1, 7] = np.nan

    letters = StructuredOutputsParams(regex="[ab]{3}")
    good = engine.intake.request([5, 6], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    bad = engine.intake.request([6] * 3, SamplingParams(max_tokens=4, logprobs=2, structured_outputs=letters))
    with_logits(llm, monkeypatch, poison)
    run(engine, [good, bad])
    assert [request.output().outputs[0].finish_reason for request in (good, bad)] == ["length", "error"]


def test_what_went_wrong_is_not_the_best(llm, monkeypatch):
    """A text that ended before its first token has no log-probability that could be low."""
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)

    request = engine.intake.request([6] * 5, SamplingParams(best_of=4, seed=0, max_tokens=4, ignore_eos=True))
    calls = []

    def once(logits):
        calls.append(len(logits))
        if len(calls) == 2:
            logits[-1] = np.nan

    with_logits(llm, monkeypatch, once)
    run(engine, [request])
    assert [text.finish_reason for text in request.sequences].count("error") == 1
    assert request.output().outputs[0].finish_reason == "length"


def test_what_never_began_is_not_the_best(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_sequences=1)
    request = engine.intake.request([6] * 5, SamplingParams(best_of=4, seed=0, max_tokens=4, ignore_eos=True))
    engine.add(request)
    engine.step()
    engine.cancel(request)
    assert len(request.output().outputs[0].token_ids) == 1


def test_a_prompt_that_shares_nothing_is_not_let_in_as_if_it_did(llm):
    """Where prompt_logprobs need the whole prompt computed, what others hold of it makes no room."""
    engine = make_engine(llm, "PAGED", 144, reserve_tokens=0)
    first = engine.intake.request([9] * 70, SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    engine.add(first)
    engine.step()
    run(engine, [engine.intake.request([9] * 70, SamplingParams(max_tokens=4, prompt_logprobs=1))])
    assert engine.stats().preemptions == 0


def test_what_a_request_left_itself_is_no_hit(llm):
    engine = make_engine(llm, "PAGED", 1 << 12, max_batch_tokens=32, max_sequences=1)
    low = engine.intake.request([9] * 100, SamplingParams(max_tokens=2), priority=5)
    engine.add(low)
    engine.step()
    run(engine, [engine.intake.request([8], SamplingParams(max_tokens=2))])
    assert engine.stats().preemptions == 1
    assert engine.stats().cached_tokens == 0


def test_a_priority_is_a_number(llm):
    engine = make_engine(llm, "SLAB_POOL", 64)
    for priority in (None, "high", 0.5):
        with pytest.raises(ValueError, match=f"priority is {priority!r}; it must be an integer"):
            engine.intake.request([5], priority=priority)


def test_what_was_refused_is_not_counted(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_waiting=1)
    engine.add(engine.intake.request([5], SamplingParams(max_tokens=2, ignore_eos=True)))
    refused = engine.intake.request([5], SamplingParams(max_tokens=2))
    with pytest.raises(QueueFull):
        engine.add(refused)
    engine.cancel(refused)
    run(engine, [])
    assert (engine.stats().requests, engine.stats().finished) == (1, {"length": 1})


@pytest.mark.parametrize("where", ["sample", "append"])
def test_an_interrupted_step_is_as_if_it_had_not_begun(llm, monkeypatch, where):
    """Also where the tokens' places were taken already, or the numbers drawn that the next tokens are drawn with."""
    params = SamplingParams(max_tokens=8, temperature=3.0, seed=3, ignore_eos=True)
    engine = make_engine(llm, "PAGED", 1 << 12)
    expected = engine.intake.request([5] * 40, params)
    run(engine, [expected])
    engine = make_engine(llm, "PAGED", 1 << 12)
    request = engine.intake.request([5] * 40, params)
    engine.add(request)
    holder, name = {"sample": (engine._sampler, "_sampling"), "append": (engine.cache, "append")}[where]
    original = getattr(holder, name)

    def interrupted(*args):
        original(*args)
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        engine.step()
    run(engine, [])
    assert seen(request) == seen(expected)
    again = engine.intake.request([5] * 40, params)  # begins with what the cache has now
    run(engine, [again])
    assert seen(again) == seen(expected)
