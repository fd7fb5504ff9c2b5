"""What a request gets does not depend on who else is there, how its prompt is cut, or how many threads there are."""

import numpy as np
import pytest

from pace import LLM, SamplingParams
from pace.engine.config import EngineConfig
from pace.engine.engine import Engine
from tests.kernels.arrays import threads

from .fakes import EOS, VOCABULARY, write_model


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return LLM(path, dtype=request.param, kv_cache_bytes=16 << 20)


def requests(count=32):
    """Prompts of mixed lengths, with parameters of every kind."""
    generator = np.random.default_rng(0)
    lengths = generator.permutation([1, 2, 5, 31, 32, 33, 100, 300] * (count // 8))
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"temperature": 1.2, "min_p": 0.05, "presence_penalty": 0.5},
    ]
    prompts = [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]
    params = [
        SamplingParams(**kinds[i % len(kinds)], seed=i, max_tokens=4 + i % 9, logprobs=2, ignore_eos=True)
        for i in range(count)
    ]
    return prompts, params


def block_bytes(llm):
    return llm.cache.tokens_needed(1) * llm.model.cache_shape.bytes_per_token


def answers(results):
    return [
        (output.token_ids, output.logprobs, output.cumulative_logprob, output.text, output.finish_reason)
        for output in (result.outputs[0] for result in results)
    ]


def with_engine(llm, **limits):
    """The same model and cache behind an engine of other limits."""
    llm.engine = Engine(
        llm.model, llm.cache, llm.tokenizer, EngineConfig(**limits), generation_config={"eos_token_id": EOS}
    )
    return llm


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def alone(llm, rung, known):
    """What each request gets by itself, on one thread."""
    with_engine(llm)
    if (llm, rung) not in known:
        with threads(1):
            known[llm, rung] = [answers(llm.generate([p], s))[0] for p, s in zip(*requests(), strict=True)]
    return known[llm, rung]


def test_alone_or_in_a_batch_on_any_number_of_threads(llm, alone):
    for count in (1, 2, 3):
        with threads(count):
            assert answers(llm.generate(*requests())) == alone
    assert llm.cache.stats().used_bytes == 0


def test_prompts_in_pieces(llm, alone):
    for max_batch_tokens in (7, 64):
        with_engine(llm, max_batch_tokens=max_batch_tokens)
        assert answers(llm.generate(*requests())) == alone


def test_the_order_of_prompts(llm, alone):
    prompts, params = requests()
    assert answers(llm.generate(prompts[::-1], params[::-1])) == alone[::-1]


def test_more_than_fit_at_once(llm, alone):
    with_engine(llm, max_sequences=3)
    assert answers(llm.generate(*requests())) == alone


def test_more_than_the_cache_holds_at_once(tmp_path, llm, alone):
    write_model(tmp_path)
    two_blocks = 2 * block_bytes(llm)
    small = LLM(tmp_path, dtype=str(llm.model.dtype), kv_cache_bytes=two_blocks)
    prompts, params = requests()
    assert small.cache.stats().capacity_tokens < sum(map(len, prompts))
    assert answers(small.generate(prompts, params)) == alone
    assert small.cache.stats().used_bytes == 0


def test_a_seed_gives_the_same_tokens_and_another_seed_others(llm, rung):
    prompt = [5, 6, 7]
    seeds = [SamplingParams(seed=seed, max_tokens=24, ignore_eos=True) for seed in (1, 2, 1)]
    one, two, again = (result.outputs[0].token_ids for result in llm.generate([prompt] * 3, seeds))
    assert one == again
    assert one != two
    unseeded = SamplingParams(max_tokens=24, ignore_eos=True)
    assert llm.generate([prompt], unseeded)[0].outputs[0].token_ids != one


def test_requests_end_when_they_end(llm):
    """Each on its own, while the others go on."""
    with_engine(llm)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    pending = [llm.engine.intake.request([7, 8], p) for p in params]
    for request in pending:
        llm.engine.add(request)
    while any(not request.finished for request in pending):
        llm.engine.step()
        held = sum(not request.finished for request in pending)
        assert llm.cache.stats().used_bytes == held * block_bytes(llm)
    assert [request.num_output_tokens for request in pending] == [1, 5, 3]
    assert [request.sequences[0].finish_reason for request in pending] == ["length"] * 3


def test_cancelling_while_waiting_and_while_running(llm):
    with_engine(llm, max_sequences=1)
    running, waiting, last = (
        llm.engine.intake.request([7, 8], SamplingParams(max_tokens=4, ignore_eos=True)) for _ in range(3)
    )
    for request in (running, waiting, last):
        llm.engine.add(request)
    llm.engine.step()
    llm.engine.cancel(waiting)
    llm.engine.cancel(running)
    llm.engine.cancel(running)
    while not last.finished:
        assert llm.engine.step() == [last]
    assert [r.sequences[0].finish_reason for r in (running, waiting, last)] == ["cancelled", "cancelled", "length"]
    assert [r.num_output_tokens for r in (running, waiting, last)] == [1, 0, 4]
    assert llm.cache.stats().used_bytes == 0


def test_who_waits_costs_a_step_nothing(llm, monkeypatch):
    """The waiting are not looked through at every step, and can be cancelled in any order."""
    with_engine(llm, max_sequences=1)
    pending = [llm.engine.intake.request([7, 8], SamplingParams(max_tokens=3, ignore_eos=True)) for _ in range(6)]
    for request in pending:
        llm.engine.add(request)
    waiting = llm.engine.scheduler.waiting
    llm.engine.step()
    assert llm.engine.scheduler.waiting is waiting
    for request in pending[1:4][::-1]:
        llm.engine.cancel(request)
    while any(not request.finished for request in pending):
        llm.engine.step()
    assert [request.num_output_tokens for request in pending] == [3, 0, 0, 0, 3, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_request_whose_numbers_break_fails_alone(llm, rung, bad):
    """One token's embedding is not finite: whoever says it fails, and nobody else notices, then or later."""
    with_engine(llm)
    prompts = [[5, 6, 7] * 20, [5, 9, 7] * 20, [8, 8]]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    expected = answers(llm.generate(prompts, params))
    embedding = llm.model.head.embedding.panels[0][:, 9]  # of token 9
    before = embedding.copy()
    embedding[...] = bad
    try:
        results = llm.generate(prompts, params)
    finally:
        embedding[...] = before
    broken = results[1].outputs[0]
    assert (broken.finish_reason, broken.token_ids, broken.logprobs, results[1].finished) == ("error", [], [], True)
    assert "NaN" in broken.stop_reason
    assert [answers(results)[i] for i in (0, 2)] == [expected[i] for i in (0, 2)]
    assert llm.cache.stats().used_bytes == 0
    assert answers(llm.generate(prompts, params)) == expected  # in the blocks that held the broken numbers


def test_an_interrupted_generate_leaves_nothing_behind(llm, monkeypatch):
    with_engine(llm)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5, 6], [7]])
    assert not llm.engine.busy
    assert llm.cache.stats().used_bytes == 0


@pytest.mark.parametrize("where", ["forward", "logits"])
def test_an_interrupted_generate_does_not_touch_the_others(llm, monkeypatch, where):
    with_engine(llm)
    params = SamplingParams(seed=3, max_tokens=12, logprobs=1, ignore_eos=True)
    expected = answers(llm.generate([[5, 6, 7]], params))
    stream = llm.stream([5, 6, 7], params)
    for _ in range(4):
        next(stream)

    def interrupted(*_):
        raise KeyboardInterrupt

    original = llm.engine.scheduler.next_batch
    with monkeypatch.context() as patch:
        # Once the new prompts are through, the batch has the paused stream in it.
        def next_batch():
            batch = original()
            if len(batch.sequences) == 3:
                patch.setattr(llm.model, where, interrupted)
            return batch

        patch.setattr(llm.engine.scheduler, "next_batch", next_batch)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5, 6], [7]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert answers([list(stream)[-1]]) == expected
    assert llm.cache.stats().used_bytes == 0


def test_a_request_whose_text_cannot_be_finished_is_over_all_the_same(llm, monkeypatch):
    with_engine(llm)
    request = llm.engine.intake.request([7, 8], SamplingParams(max_tokens=4, ignore_eos=True))
    llm.engine.add(request)
    llm.engine.step()

    def broken():
        raise RuntimeError("no text")

    monkeypatch.setattr(request.sequences[0].stream, "finish", broken)
    with pytest.raises(RuntimeError, match="no text"):
        llm.engine.cancel(request)
    assert request.sequences[0].finish_reason == "cancelled"
    assert llm.cache.stats().used_bytes == 0
    assert len(llm.generate([[7, 8]], SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2
