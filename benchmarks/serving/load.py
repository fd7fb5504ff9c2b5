"""Puts load on a server: requests at their arrivals, or so many at a time."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from .client import Client, Reply


@dataclass(frozen=True)
class Exchange:
    """One request: when it was due and when it went out, and what came back, or why nothing did."""

    asked: int  # its place among the messages
    due: float
    sent: float
    reply: Reply | None
    error: str | None = None
    ended: float = 0.0


@dataclass
class Cost:
    """What the client itself took of a CPU."""

    seconds: float = 0.0


@contextmanager
def counted_cost() -> Iterator[Cost]:
    """Garbage is not looked for meanwhile: what is kept is kept on purpose."""
    gc.collect()
    gc.disable()
    cost, began = Cost(), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = time.process_time() - began
        gc.enable()


async def exchange(client: Client, asked: int, message: bytes, due: float, timeout_s: float) -> Exchange:
    sent = time.perf_counter()
    reply, error = None, None
    try:
        async with asyncio.timeout(timeout_s):
            reply = await client.exchange(message)
    except TimeoutError:
        error = "timeout"
    except OSError:
        error = "no connection"
    return Exchange(asked, due, sent, reply, error, time.perf_counter())


async def open_loop(
    client: Client, messages: Sequence[bytes], offsets: Sequence[float], timeout_s: float
) -> list[Exchange]:
    """Each is sent when it is due, whatever the others do. It counts from then, however late it went out."""
    start = time.perf_counter()
    tasks = []
    for i, (message, offset) in enumerate(zip(messages, offsets, strict=True)):
        if (wait := start + offset - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(exchange(client, i, message, start + offset, timeout_s)))
    return await asyncio.gather(*tasks)


async def closed_loop(
    client: Client, messages: Sequence[bytes], concurrency: int, seconds: float, timeout_s: float
) -> list[Exchange]:
    """Each of so many users sends the next one when the last is answered; none begins after so many seconds."""
    waiting = iter(enumerate(messages))
    until = time.perf_counter() + seconds

    async def user() -> list[Exchange]:
        answered = []
        for i, message in waiting:
            due = time.perf_counter()
            if due > until:
                break
            answered.append(await exchange(client, i, message, due, timeout_s))
        return answered

    return list(chain.from_iterable(await asyncio.gather(*(user() for _ in range(concurrency)))))


async def until_ready(asks: Callable[[], Awaitable[bool]], wait_s: float) -> bool:
    """Whether it says so before the time is over; asked twice a second."""
    until = time.perf_counter() + wait_s
    while True:
        if await asks():
            return True
        if time.perf_counter() > until:
            return False
        await asyncio.sleep(0.5)
