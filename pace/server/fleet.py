"""The engine processes as the front process sees them: started, watched, started anew, and given requests."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
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

from .node import Ended, Failed, Loaded, NodeSettings, Report, Start, Started
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

FIRST_DELAY, LAST_DELAY = 0.5, 30.0  # seconds before a process is started anew, doubled each time it ends too soon
STEADY_SECONDS = 10.0  # that it must have been up for, to be started anew at once
WAIT_SECONDS = 10.0  # for an engine, where none is up
MOST_AT_ONCE = 64  # steps whose news make one event: with log-probabilities, those of a long text would be megabytes
WATCH_SECONDS = 1.0  # between two looks at who has fallen silent


class EngineLost(RuntimeError):
    """The engine that had a request is gone."""


class NoEngine(RuntimeError):
    """There is none to take a request, now."""


class RequestRefused(ValueError):
    """The engine says why."""


class RequestFailed(RuntimeError):
    """The engine is at fault, and goes on."""


class EngineBusy(RuntimeError):
    """The engine's queue is full."""


class ShuttingDown(RuntimeError):
    """The fleet is closed."""


_REFUSALS = {"refused": RequestRefused, "failed": RequestFailed, "busy": EngineBusy}


class Meter(Protocol):
    """Is told of a request's news as they arrive, whoever reads them when."""

    def tick(self, news: Progress | Embedded) -> None: ...


@dataclass
class _Patience:
    """How long to wait before a process is started anew."""

    up_since: float | None = None
    delay: float = 0.0

    def after_end(self) -> float:
        """Seconds: none after one that was up for long, more each time after others."""
        steady = self.up_since is not None and time.monotonic() - self.up_since > STEADY_SECONDS
        self.delay = 0.0 if steady else min(max(self.delay * 2, FIRST_DELAY), LAST_DELAY)
        self.up_since = None
        return self.delay

    def is_up(self) -> None:
        self.up_since = time.monotonic()


@dataclass
class Engine:
    """One engine process, and those that came after it in its place."""

    bearer: Bearer
    place: Place | None
    up: bool = False
    pid: int | None = None
    restarts: int = -1  # the first start is none
    silent: float = 0.0  # seconds for which it had requests and said nothing
    failure: str | None = None  # what it said at its end
    patience: _Patience = field(default_factory=_Patience)
    stats: EngineStats | None = None
    calls: dict[str, "Call"] = field(default_factory=dict)
    wishes: "zmq.Socket[bytes] | None" = None
    listening: "asyncio.Task[None] | None" = None
    first_up: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def index(self) -> int:
        return self.bearer.index

    def fail_start(self, reason: str) -> bool:
        """What is wrong with it; whether it has never been up."""
        if self.first_up.done():
            return False
        self.first_up.set_exception(ModelError(reason))
        self.first_up.exception()  # of several, one is told
        return True


@dataclass
class _Node:
    """The process that holds a copy of the weights, and its engines."""

    engines: list[Engine]
    process: asyncio.subprocess.Process | None = None
    patience: _Patience = field(default_factory=_Patience)


class Call:
    """One request at one engine: its news on the way to who asked, what was not read yet as one."""

    def __init__(self, wish: Generate | Embed, engine: Engine, meter: Meter | None = None) -> None:
        self.wish, self.engine, self._meter = wish, engine, meter
        self._unread: list[Progress | Embedded] = []
        self._error: Exception | None = None
        self._bell = asyncio.Event()
        self.over = False

    def put(self, news: Progress | Embedded) -> None:
        if self._meter is not None:
            self._meter.tick(news)
        self.over = not isinstance(news, Progress) or news.finished
        self._unread.append(news)
        self._bell.set()

    def fail(self, error: Exception) -> None:
        if not self.over:
            self._error, self.over = error, True
            self._bell.set()

    async def next(self, whole: bool) -> Any:
        """What came since this was last called, up to MOST_AT_ONCE steps of it; with `whole`, all of it once it is
        over. Raises what went wrong, where there is nothing left to read.
        """
        while not (self.over if whole else self.over or self._unread):
            self._bell.clear()
            await self._bell.wait()
        if self._error is not None and (whole or not self._unread):
            raise self._error
        most = len(self._unread) if whole else MOST_AT_ONCE
        taken, self._unread = self._unread[:most], self._unread[most:]
        return merged(taken)


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
    one engine wherever the system puts it; stall_seconds: for which an engine may have requests and say nothing.
    """

    def __init__(
        self,
        settings: NodeSettings,
        groups: Sequence[Sequence[Place | None]],
        sticky: bool = True,
        stall_seconds: float = 600.0,
    ) -> None:
        self._settings, self._sticky, self._stall_seconds = settings, sticky, stall_seconds
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
        self, wish: Generate, whole: bool = False, meter: Meter | None = None
    ) -> AsyncGenerator[Progress]:
        """What comes of a request; with `whole`, all of it at once. Leaving the iteration cancels the request.

        A request whose engine is lost before anything came of it is given to another, once: it may be what ends them.
        RequestRefused, RequestFailed, EngineBusy, NoEngine, EngineLost, ShuttingDown.
        """
        for may_repeat in (True, False):
            call = await self._call(wish, meter)
            try:
                while True:
                    news: Progress = await call.next(whole)
                    may_repeat = False
                    yield news
                    if news.finished:
                        return
            except EngineLost:
                if not may_repeat:
                    raise
            finally:
                self._leave(call)

    async def embed(self, wish: Embed, meter: Meter | None = None) -> Embedded:
        """Raises as generate does."""
        for may_repeat in (True, False):
            call = await self._call(wish, meter)
            try:
                embedded: Embedded = await call.next(whole=True)
                return embedded
            except EngineLost:
                if not may_repeat:
                    raise
            finally:
                self._leave(call)
        raise AssertionError

    async def _call(self, wish: Generate | Embed, meter: Meter | None) -> Call:
        if not self._someone_up.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._someone_up.wait(), WAIT_SECONDS)
        if self._closing:
            raise ShuttingDown("the server is shutting down")
        up = {engine.index: engine for engine in self.engines if engine.up}
        if not up:
            raise NoEngine("no engine is up: try again later")
        chain = chain_of(wish.prompt) if self._sticky and len(self.engines) > 1 else []
        engine = up[choose([engine.bearer for engine in up.values()], len(wish.prompt), chain).index]
        wish = msgspec.structs.replace(wish, id=f"{wish.id}.{next(self._names)}")
        self._send(engine, wish)
        engine.bearer.take(len(wish.prompt), chain)
        call = engine.calls[wish.id] = Call(wish, engine, meter)
        return call

    def _leave(self, call: Call) -> None:
        engine = call.engine
        if engine.calls.pop(call.wish.id, None) is None:  # it was lost with its engine
            return
        engine.bearer.release(len(call.wish.prompt))
        if not call.over:
            self._send(engine, Cancel(call.wish.id))

    def _send(self, engine: Engine, wish: Wish) -> None:
        """Never waits: the socket is the side that connects, and keeps what an engine does not take."""
        assert engine.wishes is not None
        engine.wishes.send(encode([wish]), zmq.NOBLOCK)

    # --- processes ---

    async def start(self) -> None:
        """Until all engines are up. ModelError where the model can't be loaded, or an engine ends while it begins."""
        self._spawn(self._watch())
        keepers = [self._spawn(self._keep(node)) for node in self._nodes]
        up: asyncio.Future[Any] = asyncio.gather(*(engine.first_up for engine in self.engines))
        await asyncio.wait([up, *keepers], return_when=asyncio.FIRST_COMPLETED)
        for keeper in keepers:
            if keeper.done():
                keeper.result()
        await up

    async def close(self) -> None:
        """End all processes, at once: they hold nothing that would have to be kept. Who waits is told."""
        self._closing = True
        self._someone_up.set()
        for engine in self.engines:
            self._kill(engine)
            self._lose(engine, ShuttingDown("the server is shutting down"))
        for node in self._nodes:
            if node.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    node.process.kill()
                await node.process.wait()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the server's own failed", exc_info=error)

    async def _keep(self, node: _Node) -> None:
        """Have a node's process run, and another after it."""
        while not self._closing:
            try:
                why = f"the process that holds the weights ended with {await self._run(node)}"
            except OSError as error:
                why = f"the process that holds the weights can't be started: {error}"
            if self._closing:
                return
            for engine in node.engines:
                self._kill(engine)  # it has ended with its node, if it could
                self._lose(engine, EngineLost(f"engine {engine.index} was lost: {why}"))
            if any([engine.fail_start(why) for engine in node.engines]):
                return
            delay = node.patience.after_end()
            logger.error("%s; another begins in %.1f s", why, delay)
            await asyncio.sleep(delay)

    async def _run(self, node: _Node) -> int:
        """A node's process from its beginning to its end; its exit status."""
        process = node.process = await self._launch(node)
        assert process.stdout is not None
        async for line in process.stdout:
            if line.endswith(b"\n"):  # all of it was written
                self._heed(node, msgspec.json.decode(line, type=Report))
        return await process.wait()

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
                if not any([engine.fail_start(error) for engine in node.engines]):
                    logger.error("the model can't be loaded: %s", error)
            case Loaded():
                node.patience.is_up()
                for engine in node.engines:
                    self._begin(node, engine)
            case Started(engine=index, pid=pid):
                self.engines[index].pid = pid
            case Failed(engine=index, reason=reason):
                self.engines[index].failure = reason
            case Ended(engine=index, status=status) if not self._closing:
                engine = self.engines[index]
                why = engine.failure or f"its process ended with {status}"
                self._lose(engine, EngineLost(f"engine {index} was lost: {why}"))
                if not engine.fail_start(f"engine {index} could not begin: {why}"):
                    self._spawn(self._renew(node, engine, why))

    async def _renew(self, node: _Node, engine: Engine, why: str) -> None:
        """Another process for an engine whose own has ended."""
        process, delay = node.process, engine.patience.after_end()
        logger.error("engine %d: %s; another begins in %.1f s", engine.index, why, delay)
        await asyncio.sleep(delay)
        if node.process is process and process is not None and process.returncode is None:
            self._begin(node, engine)  # else the node begins anew, with all its engines

    def _begin(self, node: _Node, engine: Engine) -> None:
        """A new process for an engine, which says Ready when it is."""
        assert node.process is not None
        engine.restarts += 1
        engine.silent, engine.failure = 0.0, None
        stem = f"ipc://{self._folder}/{engine.index}.{engine.restarts}"
        start = Start(engine.index, engine.place, f"{stem}.wishes", f"{stem}.news")
        engine.wishes = self._socket(zmq.PUSH, zmq.Socket)
        engine.wishes.connect(start.wishes)
        news = self._socket(zmq.PULL, zmq.asyncio.Socket)
        news.bind(start.news)
        engine.listening = self._spawn(self._listen(engine, news))
        self._command(node.process, start)

    def _socket(self, kind: int, of: type) -> Any:
        socket = self._context.socket(kind, of)
        socket.set_hwm(0)
        socket.linger = 0
        return socket

    async def _listen(self, engine: Engine, socket: "zmq.asyncio.Socket") -> None:
        try:
            while True:
                for news in decode_news(await socket.recv()):
                    engine.silent = 0.0
                    self._take(engine, news)
        finally:
            socket.close()

    def _take(self, engine: Engine, news: News) -> None:
        match news:
            case Progress(id=name) | Embedded(id=name) if name in engine.calls:
                engine.calls[name].put(news)
            case Refused(id=name) if name in engine.calls:
                engine.calls[name].fail(_REFUSALS[news.kind](news.reason))
            case Load():
                engine.stats = news.stats
            case Ready():
                engine.up, engine.bearer.capacity = True, news.capacity_tokens
                engine.patience.is_up()
                self._someone_up.set()
                if not engine.first_up.done():
                    engine.first_up.set_result(None)
                logger.info("engine %d is up, process %s", engine.index, engine.pid)

    async def _watch(self) -> None:
        """End engines that hang, so that others begin. An engine that works says so after each step.

        Looks are counted, not time: where this process itself stood still, an engine has had no time to be heard.
        """
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for engine in self.engines:
                if not engine.calls:
                    continue
                engine.silent += WATCH_SECONDS
                if engine.silent > self._stall_seconds:
                    engine.failure = f"it has said nothing for {self._stall_seconds:g} s"
                    self._kill(engine)

    @staticmethod
    def _kill(engine: Engine) -> None:
        if engine.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine.pid, signal.SIGKILL)

    def _lose(self, engine: Engine, error: Exception) -> None:
        """Its process has ended, or will: its requests are told."""
        engine.up, engine.pid, engine.stats = False, None, None
        if engine.listening is not None:
            engine.listening.cancel()
        if engine.wishes is not None:
            engine.wishes.close()
            engine.wishes = None
        for call in engine.calls.values():
            call.fail(error)
        engine.calls.clear()
        engine.bearer.forget()
        if not self._closing and not any(other.up for other in self.engines):
            self._someone_up.clear()
