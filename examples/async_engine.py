"""Several requests at once from asyncio: streams, a cancelled one, and one with a better priority.

python examples/async_engine.py [MODEL]
"""

import asyncio
import sys

from pace import AsyncEngine, SamplingParams


async def complete(engine, prompt, max_tokens, priority=0):
    params, text = SamplingParams(temperature=0, max_tokens=max_tokens), ""
    async for output in engine.generate(prompt, params, priority=priority):
        text += output.outputs[0].new_text
    print(f"{prompt}{text!r}")


async def cancelled(engine):
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    async for output in engine.generate("One, two, three,", params, request_id="counting"):
        if len(output.outputs[0].token_ids) >= 8 and not output.finished:
            await engine.cancel("counting")
    print(f"counting: {output.outputs[0].finish_reason}")


async def main(model):
    async with AsyncEngine.load(model) as engine:
        await asyncio.gather(
            complete(engine, "The capital of France is", 16),
            complete(engine, "The capital of Italy is", 16, priority=-1),  # the lower number goes first
            cancelled(engine),
        )
        stats = await engine.stats()
    print(f"{stats.requests} requests: {stats.finished}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2"))
