"""Twenty thousand short requests, a fifth of them left early: no token is lost or comes twice, memory stays flat."""

import asyncio
import gc
import random
import sys
from pathlib import Path

import pytest

from pace import LLM
from pace.engine.async_engine import AsyncEngine

from .fakes import write_model
from .test_scheduling import ASKED, make_engine, run

REQUESTS, AT_ONCE = 20_000, 48
WARM = 4_000  # requests, after which arenas and tables have their size
GROWTH = 16 << 20  # bytes for all the rest; a leak of one RequestOutput a request would be five times that


def resident_bytes():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
@pytest.mark.parametrize("cache", ["SLAB_POOL", "PAGED"])
def test_soak(tmp_path, cache):
    write_model(tmp_path)
    llm = LLM(tmp_path, dtype="bfloat16", kv_cache_bytes=16 << 20)
    expected = []
    for prompt, params in ASKED:
        engine = make_engine(llm, cache, 1 << 12)
        request = engine.intake.request(prompt, params)
        run(engine, [request])
        expected.append([(text.token_ids, text.text) for text in request.output().outputs])
    engine = make_engine(llm, cache, 1024, max_batch_tokens=256)
    draw, memory, ended = random.Random(0), [], {"whole": 0, "left": 0}

    async def one(served):
        which = draw.randrange(len(ASKED))
        prompt, params = ASKED[which]
        leave_after = draw.choice([None, None, 0, 1, 2]) if draw.random() < 0.6 else None
        texts, seen = [""] * params.n, [0] * params.n
        outputs = served.generate(prompt, params, priority=draw.choice([0, 0, 1]))
        count = 0
        async for output in outputs:
            for i, text in enumerate(output.outputs):
                texts[i] += text.new_text
                assert len(text.token_ids) >= seen[i]
                seen[i] = len(text.token_ids)
                if not params.chooses:  # what there is so far is how the whole begins
                    assert text.token_ids == expected[which][i][0][: seen[i]]
                    assert texts[i] == text.text
            if count == leave_after and not output.finished:
                await outputs.aclose()
                ended["left"] += 1
                return
            count += 1
        assert [(text.token_ids, text.text) for text in output.outputs] == expected[which]
        assert texts == [text for _, text in expected[which]]
        ended["whole"] += 1

    async def worker(served, left):
        while left:
            left.pop()
            await one(served)
            if len(left) == REQUESTS - WARM or not left:
                gc.collect()
                memory.append(resident_bytes())

    async def life():
        async with AsyncEngine(engine) as served:
            left = list(range(REQUESTS))
            await asyncio.gather(*(worker(served, left) for _ in range(AT_ONCE)))
            stats = await served.stats()
            assert (stats.running, stats.waiting, stats.cache.used_bytes) == (0, 0, 0)
            assert sum(stats.finished.values()) == stats.requests == REQUESTS
            assert not served._streams
            return stats

    stats = asyncio.run(life())
    assert sum(ended.values()) == REQUESTS
    assert ended["left"] > REQUESTS / 20
    print(f"{ended}, {stats.preemptions} preemptions, resident {memory[0] >> 20} … {memory[-1] >> 20} MB")
    assert memory[-1] - memory[0] < GROWTH
