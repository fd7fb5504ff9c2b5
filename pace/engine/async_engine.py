"""An engine on a thread of its own, for any number of requests at once from asyncio.

The thread alone touches the engine. What others want of it goes through a queue, and is done between two steps; with
nothing to do the thread waits there. What a step brings goes to each event loop in one call.
"""

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from .engine import Engine, EngineStats
from .intake import Prompt
from .loader import load_engine
from .pooling import PoolingParams
from .request import EmbeddingOutput, Request, RequestOutput
from .sampling_params import SamplingParams

logger = logging.getLogger("pace")

Result = TypeVar("Result")


class EngineDead(RuntimeError):
    """The engine's thread has ended; requests are not answered any more."""


class AsyncEngine:
    """Use as an async context, or `close` it at the end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._streams: dict[str, tuple[Request, _Stream]] = {}
        self._closing = self._over = False
        self._dead: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pace-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, model: str | Path, **options: Any) -> Self:
        """An engine for a model; the options are those of `load_engine`."""
        return cls(load_engine(model, **options))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The output as it grows, each with the `new_text` since the one before; where best_of is to choose, only the
        last. Who reads slowly gets more at a time. Leaving the iteration cancels the request.

        ValueError as LLM.generate's, and for an id that is in use. QueueFull where too many wait. EngineDead.
        """
        request = await asyncio.to_thread(self.engine.intake.request, prompt, sampling_params, priority, request_id)
        async with self._running(request) as stream:
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
    ) -> EmbeddingOutput:
        """The embedding of a prompt. Cancelling the task cancels the request. Raises as `generate` does."""
        request = await asyncio.to_thread(self.engine.intake.embedding, prompt, pooling_params, priority, request_id)
        async with self._running(request) as stream:
            await stream.next()  # told of once, when it has ended
        return request.embedding_output()

    @asynccontextmanager
    async def _running(self, request: Request) -> "AsyncIterator[_Stream]":
        """What comes of a request, which is cancelled where it has not ended by then."""
        stream = _Stream(asyncio.get_running_loop())
        try:  # from here on: who is cancelled while it begins has begun
            await self._on_engine(lambda: self._begin(request, stream))
            yield stream
        finally:
            self._post(lambda: self._end(request))

    async def cancel(self, request_id: str) -> None:
        """End a request; who reads it gets what there is. Nothing where it has ended."""
        await self._on_engine(lambda: self._cancel(request_id))

    async def stats(self) -> EngineStats:
        return await self._on_engine(self.engine.stats)

    def close(self) -> None:
        """End all requests and the thread. Waits for the step that runs."""
        self._post(self._close)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # --- on other threads ---

    def _post(self, wish: Callable[[], object]) -> None:
        self._inbox.put(wish)

    async def _on_engine(self, function: Callable[[], Result]) -> Result:
        """What a function gives between two steps."""
        future: Future[Result] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._post(call)
        if self._over:
            self._drain()
        return await asyncio.wrap_future(future)

    # --- on the engine's thread ---

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_in()
                self._tell(self.engine.step())
        except BaseException as error:
            logger.exception("the engine's thread ends")
            self._dead = error
        for _, stream in self._streams.values():
            with suppress(RuntimeError):  # its loop is closed
                stream.loop.call_soon_threadsafe(stream.fail, self._ended())
        self._over = True  # before the last look: what is posted from now on, its poster does
        self._drain()

    def _ended(self) -> EngineDead:
        return EngineDead(f"the engine has ended: {self._dead or 'it was closed'}")

    def _take_in(self) -> None:
        if not self.engine.busy:
            self._inbox.get()()
        self._drain()

    def _drain(self) -> None:
        with suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _begin(self, request: Request, stream: "_Stream") -> None:
        if self._closing or self._dead:
            raise self._ended()
        if request.id in self._streams:
            raise ValueError(f"request_id {request.id!r} is in use")
        self.engine.add(request)
        self._streams[request.id] = request, stream

    def _cancel(self, request_id: str) -> None:
        if request_id in self._streams:
            request, _ = self._streams[request_id]
            self.engine.cancel(request)
            self._tell([request])

    def _end(self, request: Request) -> None:
        """Nobody reads it any more."""
        if self._streams.get(request.id, (None,))[0] is request:
            del self._streams[request.id]
            if not self._dead:
                self.engine.cancel(request)

    def _close(self) -> None:
        self._closing = True
        for request, _ in list(self._streams.values()):
            self.engine.cancel(request)

    def _tell(self, requests: list[Request]) -> None:
        """What is new of each request to who reads it, in one call for each event loop."""
        news = defaultdict(list)
        for request in requests:
            if request.id in self._streams and (request.finished or not request.params.chooses):
                _, stream = self._streams[request.id]
                news[stream.loop].append((stream, request.output()))
        for loop, outputs in news.items():
            try:
                loop.call_soon_threadsafe(_publish, outputs)
            except RuntimeError:  # the loop is closed, and nobody reads
                for stream, _ in outputs:
                    for request in [request for request, other in self._streams.values() if other is stream]:
                        self._end(request)


class _Stream:
    """One request's output on its way to an event loop: what was not read yet, as one output."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._news = asyncio.Event()
        self._unread: RequestOutput | None = None
        self._error: BaseException | None = None

    def put(self, output: RequestOutput) -> None:
        if self._unread is not None:
            for earlier, later in zip(self._unread.outputs, output.outputs, strict=True):
                later.new_text = earlier.new_text + later.new_text
        self._unread = output
        self._news.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._news.set()

    async def next(self) -> RequestOutput:
        await self._news.wait()
        output, self._unread = self._unread, None
        if output is None:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._news.clear()
        return output


def _publish(outputs: list[tuple[_Stream, RequestOutput]]) -> None:
    for stream, output in outputs:
        stream.put(output)
