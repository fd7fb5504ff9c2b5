"""An engine on its own thread: many requests at once from asyncio, and every way in which they can end."""

import asyncio
import gc
import threading
import time
import weakref

import pytest

from pace import LLM, SamplingParams
from pace.engine.async_engine import AsyncEngine, EngineDead
from pace.engine.engine import QueueFull

from .fakes import VOCABULARY, write_model
from .test_scheduling import ASKED, make_engine

ENDLESS = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return LLM(path, dtype="bfloat16", kv_cache_bytes=16 << 20)


def running(engine):
    """The coroutine of a test, with an engine that is closed after it."""

    def run(test):
        async def life():
            async with AsyncEngine(engine) as served:
                await asyncio.wait_for(test(served), 120)

        asyncio.run(life())

    return run


async def last(outputs):
    return [output async for output in outputs][-1]


def texts_of(output):
    return [(text.token_ids, text.logprobs, text.text, text.finish_reason) for text in output.outputs]


@pytest.mark.parametrize("cache", ["SLAB_POOL", "PAGED"])
def test_many_at_once_as_if_alone(llm, cache):
    expected = []
    for prompt, params in ASKED:
        engine = make_engine(llm, cache, 1 << 12)
        request = engine.intake.request(prompt, params)
        engine.add(request)
        while engine.busy:
            engine.step()
        expected.append(texts_of(request.output()))
    engine = make_engine(llm, cache, 512, max_batch_tokens=64)

    @running(engine)
    async def _(served):
        async def one(prompt, params):
            streamed, before = [""] * params.n, 0
            async for output in served.generate(prompt, params):
                for i, text in enumerate(output.outputs):
                    streamed[i] += text.new_text
                    assert streamed[i] == text.text
                assert sum(len(text.token_ids) for text in output.outputs) >= before
                before = sum(len(text.token_ids) for text in output.outputs)
            return texts_of(output)

        assert await asyncio.gather(*(one(*each) for each in ASKED)) == expected
        stats = await served.stats()
        assert (stats.running, stats.waiting, stats.cache.used_bytes) == (0, 0, 0)
        assert stats.requests == len(ASKED)

    assert not served_threads()


def served_threads():
    return [thread for thread in threading.enumerate() if thread.name == "pace-engine"]


def test_leaving_cancels(llm):
    @running(make_engine(llm, "SLAB_POOL", 1 << 12))
    async def _(served):
        stream = served.generate([5], ENDLESS)
        await anext(stream)
        assert (await served.stats()).running == 1
        await stream.aclose()
        stats = await served.stats()
        assert (stats.running, stats.cache.used_bytes, stats.finished) == (0, 0, {"cancelled": 1})

        task = asyncio.create_task(last(served.generate([5], ENDLESS)))
        while not (await served.stats()).running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stats = await served.stats()
        assert (stats.running, stats.cache.used_bytes) == (0, 0)


def test_leaving_while_it_begins_cancels(llm):
    """The engine has taken it, and the one who asked is gone before they hear of it."""
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)

    @running(engine)
    async def _(served):
        task = asyncio.create_task(last(served.generate([5], ENDLESS)))
        while not engine.stats().requests:
            await asyncio.sleep(0)
            time.sleep(0.02)  # the loop is busy, and what the engine says waits
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await served.stats()).finished == {"cancelled": 1}
        assert not served._streams


def test_cancelling_by_id(llm):
    @running(make_engine(llm, "SLAB_POOL", 1 << 12))
    async def _(served):
        stream = served.generate([5], ENDLESS, request_id="mine")
        await anext(stream)
        with pytest.raises(ValueError, match="request_id 'mine' is in use"):
            await anext(served.generate([5], ENDLESS, request_id="mine"))
        await served.cancel("mine")
        await served.cancel("nobody's")
        output = await last(stream)
        assert output.finished
        assert output.outputs[0].finish_reason == "cancelled"
        assert len(output.outputs[0].token_ids) >= 1
        assert (await last(served.generate([5], SamplingParams(max_tokens=2), request_id="mine"))).finished


def test_who_reads_slowly_gets_more_at_a_time(llm):
    @running(make_engine(llm, "SLAB_POOL", 1 << 12))
    async def _(served):
        text, outputs = "", 0
        async for output in served.generate([5], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)):
            text += output.outputs[0].new_text
            outputs += 1
            while (await served.stats()).running:  # it does not wait for its reader
                await asyncio.sleep(0.001)
        assert outputs <= 3
        assert text == output.outputs[0].text
        assert len(output.outputs[0].token_ids) == 60


def test_refusals_come_before_anything_runs(llm):
    @running(make_engine(llm, "SLAB_POOL", 1 << 12, max_waiting=1, max_sequences=1))
    async def _(served):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            await anext(served.generate([VOCABULARY]))
        first = served.generate([5], ENDLESS)
        await anext(first)
        second = asyncio.create_task(anext(served.generate([5], ENDLESS)))
        while not (await served.stats()).waiting:
            await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="max_waiting is 1"):
            await anext(served.generate([5], ENDLESS))
        second.cancel()
        await first.aclose()


def test_best_of_comes_once(llm):
    @running(make_engine(llm, "SLAB_POOL", 1 << 12))
    async def _(served):
        params = SamplingParams(n=1, best_of=3, seed=1, max_tokens=5)
        assert [output.finished async for output in served.generate([5], params)] == [True]


def test_closing_ends_what_runs(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)

    async def life():
        served = AsyncEngine(engine)
        stream = served.generate([5], ENDLESS)
        await anext(stream)
        await asyncio.to_thread(served.close)
        with pytest.raises(EngineDead, match="the engine has ended: it was closed"):
            await last(stream)
        with pytest.raises(EngineDead):
            await anext(served.generate([5], ENDLESS))
        served.close()

    asyncio.run(asyncio.wait_for(life(), 60))
    assert engine.cache.stats().used_bytes == 0
    assert not served_threads()


def test_an_engine_that_breaks_tells_everybody(llm, monkeypatch, caplog):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)

    async def life():
        served = AsyncEngine(engine)
        stream = served.generate([5], ENDLESS)
        await anext(stream)

        def broken():
            raise RuntimeError("lost count")

        monkeypatch.setattr(engine.scheduler, "next_batch", broken)
        with pytest.raises(EngineDead, match="the engine has ended: lost count"):
            await last(stream)
        with pytest.raises(EngineDead, match="lost count"):
            await anext(served.generate([5], ENDLESS))
        assert (await served.stats()).requests == 1  # it can still be looked at

    asyncio.run(asyncio.wait_for(life(), 60))
    assert "the engine's thread ends" in caplog.text


def test_a_loop_that_is_gone_leaves_nothing_behind(llm):
    served = AsyncEngine(make_engine(llm, "SLAB_POOL", 1 << 12))
    kept = []

    async def begin():
        stream = served.generate([5], ENDLESS)
        await anext(stream)
        kept.append(stream)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    deadline = time.monotonic() + 60
    while served.engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not served.engine.busy
    served.close()
    assert served.engine.cache.stats().used_bytes == 0


def test_an_idle_engine_uses_no_cpu(llm):
    @running(make_engine(llm, "SLAB_POOL", 1 << 12))
    async def _(served):
        await last(served.generate([5], SamplingParams(max_tokens=3)))
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - before < 0.05  # a thread that asks again and again takes all of it


def test_a_request_that_has_ended_is_forgotten(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 12)

    @running(engine)
    async def _(served):
        made = []
        original = engine.intake.request
        engine.intake.request = lambda *args: made.append(original(*args)) or made[-1]
        await last(served.generate([5], SamplingParams(max_tokens=3)))
        await served.stats()
        forgotten = weakref.ref(made.pop())
        await served.stats()
        gc.collect()
        assert forgotten() is None
