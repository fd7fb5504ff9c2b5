"""The engine processes as the front process sees them: started, watched, started anew, and given requests."""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from pace.engine.engine import EngineStats
from pace.errors import ModelError
from pace.numa import Place
from pace.partition import union

from .node import Ended, Loaded, NodeSettings, Report, Start, Started
from .protocol import (
    Cancel,
    Embed,
    Embedded,
    Generate,
    Load,
    News,
    Piece,
    Progress,
    Ready,
    Refused,
    Wish,
    decode_news,
    encode,
)
from .router import Bearer, chain_of, choose

logger = logging.getLogger("pace")

FIRST_DELAY, LAST_DELAY = 0.5, 30.0  # seconds before an engine is started anew, doubled each time it ends too soon
STEADY_SECONDS = 10.0  # that an engine must have been up for, to be started anew at once
WAIT_SECONDS = 10.0  # for an engine, where none is up


class EngineLost(RuntimeError):
    """The engine that had a request is gone."""


class NoEngine(RuntimeError):
    """There is none to take a request, now."""


class RequestRefused(ValueError):
    """The engine says why."""


class EngineBusy(RuntimeError):
    """The engine's queue is full."""


class TimedOut(RuntimeError):
    """The request has had its time."""


class Meter(Protocol):
    """Is told of a request's news as they arrive, whoever reads them when."""

    def tick(self, news: Progress | Embedded) -> None: ...


@dataclass
class Engine:
    """One engine process, and those that came after it in its place."""

    bearer: Bearer
    place: Place | None
    up: bool = False
    pid: int | None = None
    restarts: int = -1  # the first start is none
    began: float = 0.0
    delay: float = FIRST_DELAY
    stats: EngineStats | None = None
    calls: dict[str, "Call"] = field(default_factory=dict)
    wishes: "zmq.asyncio.Socket | None" = None
    listening: "asyncio.Task[None] | None" = None

    first_up: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def index(self) -> int:
        return self.bearer.index

    def fail_start(self, reason: str) -> None:
        if not self.first_up.done():
            self.first_up.set_exception(ModelError(reason))
            self.first_up.exception()  # of several, one is told


@dataclass
class _Node:
    """The process that holds a copy of the weights, and its engines."""

    engines: list[Engine]
    process: asyncio.subprocess.Process | None = None


class Call:
    """One request at one engine: its news on the way to who asked, what was not read yet as one."""

    def __init__(
        self, wish: Generate | Embed, engine: Engine, deadline: float | None = None, meter: Meter | None = None
    ) -> None:
        self.wish, self.engine, self._meter = wish, engine, meter
        self._unread: list[Progress | Embedded] = []
        self._error: Exception | None = None
        self._bell = asyncio.Event()
        self.over = False
        loop = asyncio.get_running_loop()
        self._alarm = None if deadline is None else loop.call_at(deadline, self._time_out)

    def put(self, news: Progress | Embedded) -> None:
        if self._meter is not None:
            self._meter.tick(news)
        self.over = not isinstance(news, Progress) or news.finished
        self._unread.append(news)
        self._bell.set()

    def close(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()

    def _time_out(self) -> None:
        if not self.over:
            self.fail(TimedOut("the request was not answered in time"))
            self.over = False  # the engine does not know yet

    def fail(self, error: Exception) -> None:
        self._error, self.over = error, True
        self._bell.set()

    async def next(self) -> Progress | Embedded:
        await self._bell.wait()
        unread, self._unread = self._unread, []
        if not unread:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._bell.clear()
        news: Progress | Embedded = merged(unread)
        return news


def merged(news: Sequence[Any]) -> Any:
    """Progress after Progress, as one."""
    if len(news) == 1:
        return news[0]
    texts: dict[int, list[Piece]] = {}
    for each in news:
        for piece in each.pieces:
            texts.setdefault(piece.index, []).append(piece)
    return msgspec.structs.replace(news[-1], pieces=[_joined(pieces) for pieces in texts.values()])


def _joined(pieces: Sequence[Piece]) -> Piece:
    last = pieces[-1]
    return Piece(
        last.index,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        None if last.logprobs is None else [each for piece in pieces for each in piece.logprobs or ()],
        last.finish_reason,
        last.stop_reason,
    )


class Fleet:
    """`settings` are the same for all nodes but for their place; groups: the places of each node's engines, None for
    one engine wherever the system puts it.
    """

    def __init__(self, settings: NodeSettings, groups: Sequence[Sequence[Place | None]], sticky: bool = True) -> None:
        self._settings, self._sticky = settings, sticky
        numbers = count()
        self._nodes = [_Node([Engine(Bearer(next(numbers)), place) for place in group]) for group in groups]
        self.engines = [engine for node in self._nodes for engine in node.engines]
        self._context = zmq.asyncio.Context()
        self._folder = tempfile.mkdtemp(prefix="pace-")
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._someone_up = asyncio.Event()
        self._names = count()

    # --- requests ---

    async def generate(
        self, wish: Generate, whole: bool = False, seconds: float | None = None, meter: Meter | None = None
    ) -> AsyncGenerator[Progress]:
        """What comes of a request; with `whole`, all of it at once. Leaving the iteration cancels the request.

        A request whose engine is lost before anything came of it is given to another, once. RequestRefused, EngineBusy,
        NoEngine, EngineLost; TimedOut after that many seconds.
        """
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        may_repeat = True
        while True:
            call = await self._call(wish, deadline, meter)
            unread: list[Progress | Embedded] = []
            try:
                while not call.over or unread or not whole:
                    unread.append(await call.next())
                    if whole and not call.over:
                        continue
                    news, unread = merged(unread), []
                    may_repeat = False
                    yield news
                    if news.finished:
                        return
            except EngineLost:
                if not may_repeat:
                    raise
                may_repeat = False
            finally:
                self._leave(call)

    async def embed(self, wish: Embed, seconds: float | None = None, meter: Meter | None = None) -> Embedded:
        """Raises as generate does."""
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        for last_try in (False, True):
            call = await self._call(wish, deadline, meter)
            try:
                embedded = await call.next()
                assert isinstance(embedded, Embedded)
                return embedded
            except EngineLost:
                if last_try:
                    raise
            finally:
                self._leave(call)
        raise AssertionError

    async def _call(self, wish: Generate | Embed, deadline: float | None, meter: Meter | None) -> Call:
        if not self._someone_up.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._someone_up.wait(), WAIT_SECONDS)
        up = {engine.index: engine for engine in self.engines if engine.up}
        if not up:
            raise NoEngine("no engine is up: try again later")
        chain = chain_of(wish.prompt) if self._sticky and len(self.engines) > 1 else []
        bearer = choose([engine.bearer for engine in up.values()], len(wish.prompt), chain)
        engine = up[bearer.index]
        wish = msgspec.structs.replace(wish, id=f"{wish.id}.{next(self._names)}")
        call = engine.calls[wish.id] = Call(wish, engine, deadline, meter)
        bearer.take(len(wish.prompt), chain)
        await self._send(engine, wish)
        return call

    def _leave(self, call: Call) -> None:
        call.close()
        engine = call.engine
        if engine.calls.pop(call.wish.id, None) is None:  # it was lost with its engine
            return
        engine.bearer.release(len(call.wish.prompt))
        if not call.over and engine.up:
            self._spawn(self._send(engine, Cancel(call.wish.id)))

    async def _send(self, engine: Engine, wish: Wish) -> None:
        if engine.wishes is not None:
            with contextlib.suppress(zmq.ZMQError):
                await engine.wishes.send(encode([wish]))

    # --- processes ---

    async def start(self) -> None:
        """Until all engines are up. ModelError where the model can't be loaded, or an engine ends while it begins."""
        for node in self._nodes:
            self._spawn(self._keep(node))
        await asyncio.gather(*(engine.first_up for engine in self.engines))

    async def close(self) -> None:
        """End all processes, and what waits for them."""
        self._closing = True
        for node in self._nodes:
            if node.process is not None and node.process.stdin is not None:
                node.process.stdin.close()  # which it takes as the end
        for node in self._nodes:
            if node.process is not None:
                await node.process.wait()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in self.engines:
            self._lose(engine, "the server ends")
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _keep(self, node: _Node) -> None:
        """Have a node's process run, and another after it."""
        delay = FIRST_DELAY
        while not self._closing:
            node.process = await self._launch(node)
            assert node.process.stdout is not None
            async for line in node.process.stdout:
                self._heed(node, msgspec.json.decode(line, type=Report))
            status = await node.process.wait()
            for engine in node.engines:
                self._lose(engine, f"the process that holds its weights ended with {status}")
            if not self._closing:
                logger.error("a node's process ended with %d: it is started again in %.1f s", status, delay)
                await asyncio.sleep(delay)
                delay = min(delay * 2, LAST_DELAY)

    async def _launch(self, node: _Node) -> asyncio.subprocess.Process:
        home = str(Path(__file__).parents[2])  # where this package is
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "pace.server.node"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # a terminal's Ctrl-C is not for it
        )
        places = [engine.place for engine in node.engines if engine.place is not None]
        settings = msgspec.structs.replace(self._settings, place=union(places) if places else None)
        self._command(process, settings)
        return process

    @staticmethod
    def _command(process: asyncio.subprocess.Process, line: NodeSettings | Start) -> None:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(line) + b"\n")

    def _heed(self, node: _Node, report: Report) -> None:
        match report:
            case Loaded(error=str(error)):
                logger.error("the model can't be loaded: %s", error)
                for engine in node.engines:
                    engine.fail_start(error)
            case Loaded():
                for engine in node.engines:
                    self._begin(node, engine)
            case Started(engine=index, pid=pid):
                self.engines[index].pid = pid
            case Ended(pid=pid, status=status):
                for engine in node.engines:
                    if engine.pid == pid:
                        self._spawn(self._renew(node, engine, status))

    def _begin(self, node: _Node, engine: Engine) -> None:
        """A new process for an engine, which says Ready when it is."""
        assert node.process is not None
        engine.restarts += 1
        engine.began = time.monotonic()
        stem = f"ipc://{self._folder}/{engine.index}.{engine.restarts}"
        start = Start(engine.index, engine.place, f"{stem}.wishes", f"{stem}.news")
        engine.wishes, news = self._bound(zmq.PUSH, start.wishes), self._bound(zmq.PULL, start.news)
        engine.listening = self._spawn(self._listen(engine, news))
        self._command(node.process, start)

    def _bound(self, kind: int, address: str) -> "zmq.asyncio.Socket":
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.linger = 0
        socket.bind(address)
        return socket

    async def _listen(self, engine: Engine, socket: "zmq.asyncio.Socket") -> None:
        try:
            while True:
                for news in decode_news(await socket.recv()):
                    self._take(engine, news)
        finally:
            socket.close()

    def _take(self, engine: Engine, news: News) -> None:
        match news:
            case Progress(id=name) | Embedded(id=name) if name in engine.calls:
                engine.calls[name].put(news)
            case Refused(id=name) if name in engine.calls:
                error = EngineBusy if news.queue_full else RequestRefused
                engine.calls[name].fail(error(news.reason))
            case Load():
                engine.stats = news.stats
            case Ready():
                engine.up, engine.bearer.capacity = True, news.capacity_tokens
                self._someone_up.set()
                if not engine.first_up.done():
                    engine.first_up.set_result(None)
                logger.info("engine %d is up, process %s", engine.index, engine.pid)

    async def _renew(self, node: _Node, engine: Engine, status: int) -> None:
        """After the end of an engine's process: its requests are told, and another begins."""
        why = f"its process ended with {status}"
        if not engine.first_up.done():
            engine.fail_start(f"engine {engine.index} could not begin: {why}")
        lived = time.monotonic() - engine.began if engine.up else 0.0
        self._lose(engine, why)
        engine.delay = 0.0 if lived > STEADY_SECONDS else min(max(engine.delay * 2, FIRST_DELAY), LAST_DELAY)
        process = node.process
        logger.error("engine %d: %s; another begins in %.1f s", engine.index, why, engine.delay)
        await asyncio.sleep(engine.delay)
        if node.process is process:  # else the node has begun anew, with all its engines
            self._begin(node, engine)

    def _lose(self, engine: Engine, why: str) -> None:
        engine.up, engine.pid, engine.stats = False, None, None
        if engine.listening is not None:
            engine.listening.cancel()
        if engine.wishes is not None:
            engine.wishes.close()
            engine.wishes = None
        for call in engine.calls.values():
            if not call.over:
                call.fail(EngineLost(f"engine {engine.index} was lost: {why}"))
        engine.calls.clear()
        engine.bearer.forget()
        if not any(other.up for other in self.engines):
            self._someone_up.clear()
