"""Embeddings: what they are, that nothing shows in them of who else was there, and every way in which they can end."""

import asyncio
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pace import LLM, PoolingParams, SamplingParams
from pace.cache import CACHES
from pace.engine.async_engine import AsyncEngine, EngineDead
from pace.engine.engine import QueueFull
from pace.engine.pooling import Pool
from tests.kernels.arrays import BF16, F32, threads

from .fakes import VOCABULARY, byte_tokens, write_model
from .test_async_engine import ENDLESS, last, running
from .test_scheduling import ASKED, CASES, LONGEST, make_engine, run, seen

# float32, of the order of the sums in each of the layers; the states themselves are about 1.
CLOSE = {"rtol": 0, "atol": 2e-5}
PARAMS = [PoolingParams(pooling=pooling, normalize=normal) for pooling in ("last", "mean") for normal in (False, True)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return LLM(path, dtype=request.param, kv_cache_bytes=16 << 20)


def tokens_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()


def states(llm, prompt):
    """The final hidden states of a prompt that goes through the model in one piece, by itself."""
    cache = make_engine(llm, "DYNAMIC", 1 << 10).cache
    return llm.model.forward(np.array(prompt, np.int32), cache.append([cache.allocate()], [len(prompt)]), cache)


def embedding_of(hidden, params):
    """The definition: sums in float64, one row after the other."""
    pooled = hidden[-1].astype(np.float64)
    if params.pooling == "mean":
        pooled = np.add.accumulate(hidden.astype(np.float64))[-1] / len(hidden)
    return (pooled / np.sqrt((pooled**2).sum()) if params.normalize else pooled).astype(np.float32)


def bits(array):
    assert (array.dtype, array.ndim) == (np.float32, 1)
    return array.tobytes()


def embed(engine, prompt, params=None, **options):
    """A request for an embedding, to its end."""
    request = engine.intake.embedding(prompt, params, **options)
    run(engine, [request])
    return request


# --- what it is ---


@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_what_transformers_says(directory, peer, length):
    llm, prompt = LLM(directory, dtype="float32", kv_cache_bytes=4 << 20), tokens_of(length)
    with torch.no_grad():
        hidden = peer.model(torch.tensor([prompt])).last_hidden_state[0]
    normal = torch.nn.functional.normalize
    wanted = [hidden[-1], normal(hidden[-1], dim=0), hidden.mean(0), normal(hidden.mean(0), dim=0)]
    outputs = llm.embed([prompt] * 4, PARAMS)
    for output, expected in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(output.embedding, expected.numpy(), **CLOSE)
    if length > 1:
        assert np.abs(outputs[0].embedding - outputs[2].embedding).max() > 0.1
    assert np.linalg.norm(outputs[0].embedding) > 2
    np.testing.assert_allclose([np.linalg.norm(each.embedding) for each in outputs[1::2]], 1, rtol=1e-6)


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_states_that_forward_gives_in_one_piece(llm, rung, params):
    for length in (1, 2, 33, 300):
        prompt = tokens_of(length)
        with threads(1):
            expected = bits(embedding_of(states(llm, prompt), params))
        for count in (1, 2, 3):
            with threads(count):
                engine = make_engine(llm, "SLAB_POOL", 1 << 10, max_batch_tokens=64)
                assert bits(embed(engine, prompt, params).embedding) == expected


def test_defaults_are_the_last_token_normalised(directory):
    llm = LLM(directory, kv_cache_bytes=4 << 20)
    (output,) = llm.embed("hello")
    assert bits(output.embedding) == bits(
        llm.embed(["hello"], PoolingParams(pooling="last", normalize=True))[0].embedding
    )
    assert PoolingParams() == PoolingParams(pooling="last", normalize=True)
    assert np.linalg.norm(output.embedding) == pytest.approx(1)


def test_what_comes_back(directory):
    llm = LLM(directory, kv_cache_bytes=4 << 20)
    outputs = llm.embed(["hello", byte_tokens("ab"), "ab"], [PARAMS[1], PARAMS[0], PARAMS[0]], priority=[2, 1, 0])
    assert [(output.prompt, output.prompt_token_ids) for output in outputs] == [
        ("hello", llm.tokenizer.encode("hello")), (None, byte_tokens("ab")), ("ab", byte_tokens("ab")),
    ]  # fmt: skip
    assert bits(outputs[1].embedding) == bits(outputs[2].embedding) != bits(outputs[0].embedding)
    assert len({output.request_id for output in outputs}) == 3
    for output in outputs:
        assert (output.finish_reason, output.stop_reason) == ("stop", None)
        usage, metrics = output.usage, output.metrics
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(output.prompt_token_ids), 0)
        assert usage.total_tokens == usage.prompt_tokens
        assert metrics.arrived <= metrics.finished
    assert llm.embed([]) == []
    assert len(llm.embed(np.array(byte_tokens("ab")))) == 1
    stats = llm.stats()
    assert (stats.requests, stats.finished, stats.output_tokens) == (4, {"stop": 4}, 0)
    assert stats.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs) + 2
    assert (stats.running, stats.waiting, stats.cache.used_bytes) == (0, 0, 0)


def test_a_step_tells_of_it_when_it_has_ended_and_nothing_is_sampled(llm, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 10, max_batch_tokens=16)
    rows, logits = [], llm.model.logits
    monkeypatch.setattr(llm.model, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    requests = [engine.intake.embedding(tokens_of(length), params) for length in (1, 40) for params in PARAMS]
    for request in requests:
        engine.add(request)
    told = []
    while engine.busy:
        now = engine.step()
        assert all(request.finished and request.embedding is not None for request in now)
        told += now
    assert (sorted(told, key=requests.index), rows) == (requests, [])
    generated = engine.intake.request(tokens_of(3), GREEDY)
    run(engine, [generated, engine.intake.embedding(tokens_of(2)), engine.intake.embedding([5])])
    assert rows == [1] * 6


def test_the_pieces_do_not_show_nor_what_comes_again():
    rows = np.random.default_rng(0).standard_normal((9, 5)).astype(F32)
    rows[5] *= 1e30  # what was before is lost in it, unless it meets the next row first
    rows[6] = -rows[5]
    for dtype in (F32, BF16):
        hidden = rows.astype(dtype)
        for params in PARAMS:
            expected, pool = bits(embedding_of(hidden, params)), Pool(params)
            for at, end in ((0, 4), (2, 4), (0, 1), (1, 5), (4, 9)):  # as a preempted prompt comes
                pool.add(hidden[at:end], at)
            assert bits(pool.embedding()) == expected


def test_a_state_of_zeros_has_no_direction():
    pool = Pool(PoolingParams())
    pool.add(np.zeros((1, 4), F32), 0)
    assert pool.embedding().tolist() == [0, 0, 0, 0]


# --- the same bits, whoever else is there ---

TO_EMBED = [(prompt, params) for prompt, _ in ASKED[::3] for params in PARAMS]


@pytest.fixture(scope="module")
def known(llm):
    return [bits(embedding_of(states(llm, prompt), params)) for prompt, params in TO_EMBED]


@pytest.fixture(scope="module")
def written(llm):
    """What the requests that write something give by themselves."""
    found = []
    for prompt, params in ASKED:
        engine = make_engine(llm, "DYNAMIC", 1 << 12)
        found.append(engine.intake.request(prompt, params))
        run(engine, found[-1:])
    return [seen(request) for request in found]


arrivals = st.lists(
    st.tuples(
        st.integers(0, len(TO_EMBED) - 1) | st.integers(-len(ASKED), -1),  # which; the negative ones write something
        st.integers(0, 6),  # steps before the next one comes
        st.integers(-1, 1),  # priority
        st.none() | st.none() | st.integers(0, 12),  # cancelled after so many steps
    ),
    min_size=1,
    max_size=20,
)


@pytest.mark.parametrize(("cache", "prefix_caching"), CASES)
@settings(max_examples=15, deadline=None)
@given(
    arrivals=arrivals,
    room=st.integers(0, 6),
    chunk=st.sampled_from([1, 2, 7, 16, 37, 64, 512]) | st.integers(1, 512),
    sequences=st.sampled_from([1, 3, 256]),
    policy=st.sampled_from(["prefill_first", "decode_first"]),
    reserve=st.sampled_from([0, 1, 64]),
)
def test_as_if_alone(llm, known, written, cache, prefix_caching, arrivals, room, chunk, sequences, policy, reserve):
    least = make_engine(llm, cache, 1 << 12).cache.tokens_needed(LONGEST)
    engine = make_engine(
        llm, cache, least + 16 * room, prefix_caching, policy=policy, max_batch_tokens=chunk,
        max_sequences=sequences, reserve_tokens=reserve,
    )  # fmt: skip
    come, doomed, step, next_at = [], [], 0, 0
    pending = list(arrivals)
    while pending or engine.busy:
        while pending and step >= next_at:
            which, wait, priority, cancelled_after = pending.pop(0)
            asked, make = (TO_EMBED, engine.intake.embedding) if which >= 0 else (ASKED, engine.intake.request)
            come.append((which, make(*asked[which], priority=priority)))
            engine.add(come[-1][1])
            if cancelled_after is not None:
                doomed.append((step + cancelled_after, come[-1][1]))
            next_at = step + wait
        for at, request in doomed:
            if at == step:
                engine.cancel(request)
        told = engine.step()
        assert all(request.finished for request in told if request.pool is not None)
        step += 1
        assert step < 20000, "it does not end"
    for which, request in come:
        reason = request.sequences[0].finish_reason
        if reason == "cancelled" and request in [doom for _, doom in doomed]:
            assert request.embedding is None
        elif which >= 0:
            assert (reason, bits(request.embedding)) == ("stop", known[which])
        elif "cancelled" not in [text.finish_reason for text in request.sequences]:
            assert seen(request) == written[which]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache.used_bytes, stats.cache.used_tokens) == (0, 0, 0, 0)
    assert sum(stats.finished.values()) == stats.requests == len(arrivals)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_who_makes_room_in_the_middle_of_a_prompt_gives_the_same(llm, cache, params):
    prompt = tokens_of(70)
    engine = make_engine(llm, cache, 1 << 12, max_batch_tokens=16, max_sequences=1)
    low = engine.intake.embedding(prompt, params, priority=1)
    engine.add(low)
    for _ in range(3):
        assert engine.step() == []
    assert low.sequences[0].computed == 48
    run(engine, [engine.intake.embedding(tokens_of(20, seed=1), params)])
    assert engine.stats().preemptions == 1
    assert bits(low.embedding) == bits(embedding_of(states(llm, prompt), params))


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("where", ["forward", "sample"])
def test_an_interrupted_step_is_as_if_it_had_not_begun(llm, monkeypatch, where, params):
    engine = make_engine(llm, "PAGED", 1 << 12, max_batch_tokens=33)
    prompt = tokens_of(80)
    beside, request = engine.intake.request([5], ENDLESS), engine.intake.embedding(prompt, params)
    for each in (beside, request):
        engine.add(each)
    holder, name = {"forward": (llm.model, "forward"), "sample": (engine._sampler, "_sampling")}[where]
    original = getattr(holder, name)

    def interrupted(*args):
        original(*args)
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        assert not request.finished
        engine.step()
    assert bits(request.embedding) == bits(embedding_of(states(llm, prompt), params))
    assert engine.stats().finished == {"stop": 1}
    engine.cancel(beside)
    assert engine.cache.stats().used_bytes == 0


@pytest.mark.parametrize("cache", ["PAGED", "SLAB_POOL"])
def test_the_last_token_is_found_behind_a_prefix_and_the_mean_reads_it_all(llm, cache):
    prompt = tokens_of(70)
    engine = make_engine(llm, cache, 1 << 12, prefix_caching=True)
    run(engine, [engine.intake.request(prompt, GREEDY)])
    cached = {}
    for params in PARAMS:
        request = embed(engine, prompt, params)
        assert bits(request.embedding) == bits(embedding_of(states(llm, prompt), params))
        cached[params] = request.embedding_output().usage.cached_tokens
    assert list(cached.values()) == [64, 64, 0, 0]
    assert engine.stats().cached_tokens == 128
    # And what a mean has left there is found by others.
    other = make_engine(llm, cache, 1 << 12, prefix_caching=True)
    embed(other, prompt, PARAMS[2])
    assert embed(other, prompt).cached_tokens == 64


def test_a_mean_is_not_let_in_as_if_it_shared(llm):
    """What others hold of its prompt makes no room for it."""
    engine = make_engine(llm, "PAGED", 144, reserve_tokens=0)
    engine.add(engine.intake.request([9] * 70, SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)))
    engine.step()
    embed(engine, [9] * 70, PARAMS[2])
    assert engine.stats().preemptions == 0


def test_it_needs_no_room_for_output(llm):
    """Two whose prompts fill the cache run side by side, whatever is reserved for output."""
    engine = make_engine(llm, "SLAB_POOL", 64, reserve_tokens=64)
    requests = [engine.intake.embedding(tokens_of(32, seed)) for seed in range(2)]
    for request in requests:
        engine.add(request)
    assert engine.step() == requests


# --- bad input ---


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"pooling": "max"}, "pooling is 'max'; it must be last or mean"),
        ({"pooling": None}, "pooling is None; it must be last or mean"),
        ({"pooling": ["last"]}, "pooling is .*; it must be last or mean"),
        ({"normalize": 1}, "normalize is 1; it must be True or False"),
        ({"normalize": None}, "normalize is None; it must be True or False"),
    ],
)
def test_bad_pooling_params(values, match):
    with pytest.raises(ValueError, match=match):
        PoolingParams(**values)


def test_pooling_params_are_frozen():
    with pytest.raises(FrozenInstanceError):
        PoolingParams().pooling = "mean"
    assert len({PoolingParams(), PoolingParams()}) == 1


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ([], None, "the prompt is empty: give at least one token"),
        ("", None, "the prompt is empty: give at least one token"),
        ([VOCABULARY], None, f"token {VOCABULARY} of the prompt is outside the vocabulary of {VOCABULARY}"),
        ([5] * 513, None, "the prompt has 513 tokens; the model's context is 512: shorten it"),
        ([5], GREEDY, "pooling_params is SamplingParams.*; it must be PoolingParams, or None"),
        ([5], "mean", "pooling_params is 'mean'; it must be PoolingParams, or None"),
    ],
)
def test_bad_requests(directory, prompt, params, match):
    llm = LLM(directory, kv_cache_bytes=4 << 20)
    with pytest.raises(ValueError, match=match):
        llm.embed([[5, 6], prompt], [PoolingParams(), params])
    with pytest.raises(ValueError, match="there are 1 prompts and 2 pooling_params"):
        llm.embed([[5, 6]], [PoolingParams(), params])
    assert not llm.engine.busy  # nor does the good prompt wait
    assert llm.stats().requests == 0


def test_a_priority_is_a_number(llm):
    with pytest.raises(ValueError, match="priority is 'high'; it must be an integer"):
        make_engine(llm, "SLAB_POOL", 64).intake.embedding([5], priority="high")


def test_a_prompt_may_fill_the_context_and_the_cache(llm):
    engine = make_engine(llm, "SLAB_POOL", 512)
    prompt = tokens_of(512)
    assert bits(embed(engine, prompt).embedding) == bits(embedding_of(states(llm, prompt), PoolingParams()))
    small = make_engine(llm, "SLAB_POOL", 64)
    assert embed(small, [5] * 64).embedding is not None
    needed = 80 * llm.model.cache_shape.bytes_per_token
    with pytest.raises(ValueError, match=f"65 tokens do not fit the cache's 64: give kv_cache_bytes of {needed} or"):
        small.intake.embedding([5] * 65)


def test_the_queue_has_one_limit_for_all(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_waiting=2)
    engine.add(engine.intake.embedding([5]))
    engine.add(engine.intake.request([5], GREEDY))
    for refused in (engine.intake.embedding([5]), engine.intake.request([5], GREEDY)):
        with pytest.raises(QueueFull, match="2 requests wait, and max_waiting is 2"):
            engine.add(refused)
    run(engine, [])
    assert engine.stats().finished == {"stop": 1, "length": 1}


# --- other ends ---


def test_priorities(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_sequences=1, max_batch_tokens=16)
    ends = []
    for name, priority in (("a", 1), ("b", 2), ("c", 0)):
        engine.add(engine.intake.embedding([5] * 20, priority=priority, request_id=name))
    while engine.busy:
        ends += [request.id for request in engine.step()]
    assert ends == ["c", "a", "b"]


def test_cancelling_while_waiting_and_while_running(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_sequences=1, max_batch_tokens=16)
    requests = [engine.intake.embedding(tokens_of(40), params) for params in PARAMS[1:]]
    for request in requests:
        engine.add(request)
    engine.step()
    held = engine.cache.stats().used_bytes
    for request in requests[:2]:
        engine.cancel(request)
        engine.cancel(request)
    assert engine.cache.stats().used_bytes == 0 < held
    run(engine, [])
    outputs = [request.embedding_output() for request in requests]
    assert [output.finish_reason for output in outputs] == ["cancelled", "cancelled", "stop"]
    assert [output.embedding is None for output in outputs] == [True, True, False]
    assert engine.stats().finished == {"cancelled": 2, "stop": 1}
    engine.cancel(requests[2])  # it has ended
    assert engine.stats().finished == {"cancelled": 2, "stop": 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("chunk", [7, 512])
def test_one_whose_numbers_break_fails_alone(llm, rung, bad, chunk):
    """One token's embedding is not finite: whose prompt has it fails, and nobody else notices, then or later."""
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_batch_tokens=chunk)
    broken = [engine.intake.embedding([5, 9, *[7] * 20], params) for params in PARAMS]
    good = [engine.intake.embedding([5, 6, *[7] * 20], params) for params in PARAMS]
    panel = llm.model.head.embedding.panels[0][:, 9]  # of token 9
    before = panel.copy()
    panel[...] = bad
    try:
        run(engine, [each for pair in zip(broken, good, strict=True) for each in pair])
    finally:
        panel[...] = before
    for request in broken:
        output = request.embedding_output()
        assert (output.finish_reason, output.embedding) == ("error", None)
        assert output.stop_reason == "the hidden states hold NaN or infinity"
    expected = [bits(embedding_of(states(llm, [5, 6, *[7] * 20]), params)) for params in PARAMS]
    assert [bits(request.embedding) for request in good] == expected
    assert engine.stats().finished == {"error": 4, "stop": 4}
    assert engine.cache.stats().used_bytes == 0
    again = [embed(engine, [5, 9, *[7] * 20], params) for params in PARAMS]  # in the room that the broken numbers had
    assert [bits(request.embedding) for request in again] == [
        bits(embedding_of(states(llm, [5, 9, *[7] * 20]), params)) for params in PARAMS
    ]


def test_a_step_that_raises_ends_it_with_its_batch(llm, monkeypatch, caplog):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)
    request = engine.intake.embedding(tokens_of(5))
    engine.add(request)

    def broken(*_):
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "forward", broken)
        assert engine.step() == [request]
    output = request.embedding_output()
    assert (output.finish_reason, output.stop_reason) == ("error", "RuntimeError: no such luck")
    assert output.embedding is None
    assert embed(engine, tokens_of(5)).embedding is not None


def test_an_interrupted_embed_leaves_nothing_behind(directory, monkeypatch):
    llm = LLM(directory, kv_cache_bytes=4 << 20)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.embed([[5, 6], [7]])
    assert not llm.engine.busy
    assert llm.stats().finished == {"cancelled": 2}
    assert llm.cache.stats().used_bytes == 0


# --- from asyncio ---


def test_many_at_once_beside_texts(llm, known, written):
    @running(make_engine(llm, "PAGED", 512, max_batch_tokens=64))
    async def _(served):
        embedded = asyncio.gather(*(served.embed(*each) for each in TO_EMBED))
        texts = asyncio.gather(*(last(served.generate(*each)) for each in ASKED[::4]))
        assert [bits(output.embedding) for output in await embedded] == known
        for output, whole in zip(await texts, written[::4], strict=True):
            assert [text.token_ids for text in output.outputs] == [text[0] for text in whole[0]]
        stats = await served.stats()
        assert (stats.running, stats.cache.used_bytes, stats.requests) == (0, 0, len(TO_EMBED) + len(ASKED[::4]))
        assert not served._streams


def held_up(engine, monkeypatch, request_id):
    """Nobody of that name is let in."""
    original = engine.scheduler._has_room

    def has_room(sequence, *gone):
        return sequence.request.id != request_id and original(sequence, *gone)

    monkeypatch.setattr(engine.scheduler, "_has_room", has_room)


def test_every_other_end_from_asyncio(llm, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12, max_waiting=1)
    held_up(engine, monkeypatch, "mine")

    @running(engine)
    async def _(served):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            await served.embed([VOCABULARY])

        async def waits():
            task = asyncio.create_task(served.embed([5, 6], request_id="mine", priority=3))
            while not (await served.stats()).waiting:
                await asyncio.sleep(0)
            return task

        task = await waits()
        with pytest.raises(QueueFull, match="max_waiting is 1"):
            await served.embed([5])
        with pytest.raises(ValueError, match="request_id 'mine' is in use"):
            await served.embed([5], request_id="mine")
        await served.cancel("mine")
        output = await task
        assert (output.request_id, output.finish_reason, output.embedding) == ("mine", "cancelled", None)
        task = await waits()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await served.stats()).waiting == 0
        assert (await served.stats()).finished == {"cancelled": 2}
        assert (await served.embed([5], PARAMS[2])).finish_reason == "stop"


def test_a_closed_engine_says_so(llm, monkeypatch):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)
    held_up(engine, monkeypatch, "mine")

    async def life():
        served = AsyncEngine(engine)
        task = asyncio.create_task(served.embed([5], request_id="mine"))
        while not (await served.stats()).waiting:
            await asyncio.sleep(0)
        await asyncio.to_thread(served.close)
        with pytest.raises(EngineDead, match="the engine has ended: it was closed"):
            await task
        with pytest.raises(EngineDead):
            await served.embed([5])

    asyncio.run(asyncio.wait_for(life(), 60))
    assert engine.cache.stats().used_bytes == 0
