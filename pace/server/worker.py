"""An engine in a process of its own: wishes come in over one socket, news goes out over another.

The main thread alone touches the engine. A second one reads wishes and makes requests of them, so that no step waits
for that; a third makes those that have a grammar to compile, which may take a while, so that no other request waits.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import zmq

from pace.engine.engine import Engine, QueueFull
from pace.engine.images import Pixels
from pace.engine.intake import Prompt
from pace.engine.pooling import PoolingParams
from pace.engine.request import Request

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
    decode_wishes,
    encode,
    sampling_params,
)

logger = logging.getLogger("pace")

LOAD_SECONDS = 0.25  # between two reports of how the engine is doing


def work(engine: Engine, wishes: str, news: str) -> None:
    """Serve the front process at these two addresses; never returns."""
    context = zmq.Context()
    with _socket(context, zmq.PULL) as inlet, _socket(context, zmq.PUSH) as outlet:
        inlet.bind(wishes)
        outlet.connect(news)
        _Worker(engine, inlet, outlet).run()


def _socket(context: "zmq.Context[Any]", kind: int) -> "zmq.Socket[bytes]":
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.set_hwm(0)  # nothing is dropped, and no step waits for a reader
    socket.linger = 0
    return socket


class _Worker:
    def __init__(self, engine: Engine, inlet: "zmq.Socket[bytes]", outlet: "zmq.Socket[bytes]") -> None:
        self.engine, self._inlet, self._outlet = engine, inlet, outlet
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._slow: SimpleQueue[Wish] = SimpleQueue()
        self._requests: dict[str, Request] = {}
        self._news: list[News] = [Ready(engine.cache.stats().capacity_tokens)]
        self._reported = 0.0

    def run(self) -> None:
        for work in (self._read, self._compile):
            threading.Thread(target=_to_the_end, args=(work,), name=f"pace{work.__name__}", daemon=True).start()
        while True:
            self._report()
            self._send()
            self._take_in()
            for request in self.engine.step():
                self._tell(request)

    # --- on the threads that read and compile ---

    def _read(self) -> None:
        while True:
            for wish in decode_wishes(self._inlet.recv()):
                if isinstance(wish, Cancel) or _has_grammar(wish):
                    self._slow.put(wish)
                if not _has_grammar(wish):
                    self._inbox.put(self._prepared(wish))

    def _compile(self) -> None:
        """What is cancelled comes by here as well, after what it cancels; the second time there is nothing to it."""
        while True:
            self._inbox.put(self._prepared(self._slow.get()))

    def _prepared(self, wish: Wish) -> Callable[[], None]:
        """What there is to do about a wish between two steps."""
        if isinstance(wish, Cancel):
            return lambda: self._cancel(wish.id)
        try:
            request = self._request(wish)
        except ValueError as error:
            refused = Refused(wish.id, str(error))
        except Exception as error:
            logger.exception("request %s could not be made", wish.id)
            refused = Refused(wish.id, f"{type(error).__name__}: {error}", "failed")
        else:
            return lambda: self._add(request)
        return lambda: self._news.append(refused)

    def _request(self, wish: Wish) -> Request:
        intake = self.engine.intake
        if isinstance(wish, Embed):
            return intake.embedding(wish.prompt, PoolingParams(**wish.params), wish.priority, wish.id)
        assert not isinstance(wish, Cancel)
        prompt: Prompt = wish.prompt
        if wish.images:
            assert self.engine.model.images is not None
            shape = (*self.engine.model.images.size, 3)
            images = [Pixels(np.frombuffer(values, np.uint8).reshape(shape)) for values in wish.images]
            prompt = {"prompt": wish.prompt, "images": images}
        return intake.request(prompt, sampling_params(wish.params), wish.priority, wish.id)

    # --- on the engine's thread ---

    def _take_in(self) -> None:
        if not self.engine.busy:
            self._report(idle=True)
            self._send()
            self._inbox.get()()
        try:
            while True:
                self._inbox.get_nowait()()
        except Empty:
            pass

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except QueueFull as error:
            self._news.append(Refused(request.id, str(error), "busy"))
        else:
            self._requests[request.id] = request

    def _cancel(self, request_id: str) -> None:
        """Who cancels does not listen any more."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.engine.cancel(request)

    def _tell(self, request: Request) -> None:
        if request.finished:
            self._requests.pop(request.id, None)
        if request.pool is not None:
            self._news.append(_embedded(request))
        elif request.finished or not request.params.chooses:
            self._news.append(_progress(request))

    def _report(self, idle: bool = False) -> None:
        now = time.monotonic()
        if idle or now - self._reported > LOAD_SECONDS:
            self._reported = now
            self._news.append(Load(self.engine.stats()))

    def _send(self) -> None:
        if self._news:
            self._outlet.send(encode(self._news))
            self._news.clear()


def _has_grammar(wish: Wish) -> bool:
    return isinstance(wish, Generate) and "structured_outputs" in wish.params


def _to_the_end(work: Callable[[], None]) -> None:
    """A thread without which there is no engine."""
    try:
        work()
    except BaseException:
        logger.exception("a thread of the engine fails")
    os._exit(1)


def _progress(request: Request) -> Progress:
    asked = request.finished and request.params.prompt_logprobs is not None
    return Progress(
        request.id,
        [Piece.of(*piece) for piece in request.news()],
        request.num_output_tokens,
        request.cached_tokens or 0,
        request.finished,
        list(request.prompt_logprobs) if asked else None,
        request.metrics.drafted,
        request.metrics.accepted,
    )


def _embedded(request: Request) -> Embedded:
    embedding = None if request.embedding is None else request.embedding.tobytes()
    reason = None if embedding is not None else str(request.sequences[0].stop_reason)
    return Embedded(request.id, embedding, reason, request.cached_tokens or 0)
