"""Answers as they leave: whole, or as a stream of events; and never for a client that is gone."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from .errors import APIError, unexpected
from .guard import Receive, Scope, Send
from .protocol import Piece, Progress
from .service import Exchange, as_api_errors

logger = logging.getLogger("pace")

Result = TypeVar("Result")
LAST_WORDS_SECONDS = 1.0  # for a client to take what went wrong

as_json = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """Nobody waits for the answer."""


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return as_json(content)


class EventStream(Response):
    """Server-sent events, one for each item. The status is that of the first: what goes wrong before it, or before
    there is any, is an answer with a status of its own; what goes wrong later is an event.
    """

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncGenerator[dict[str, Any]], receive: Receive) -> None:
        self._exchange, self._events, self._gone = exchange, events, asyncio.ensure_future(_until_gone(receive))
        self._first: dict[str, Any] = {}
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.raw_headers[[name for name, _ in self.raw_headers].index(b"content-length")]

    @classmethod
    async def begin(cls, exchange: Exchange, events: AsyncGenerator[dict[str, Any]], receive: Receive) -> "EventStream":
        stream = cls(exchange, events, receive)
        try:
            stream._first = await _in_time(exchange, stream._gone, events.__anext__())
        except BaseException:
            stream._gone.cancel()
            await events.aclose()
            raise
        return stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome, reason = "cancelled", None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _in_time(self._exchange, self._gone, self._pump(send))
            outcome = "ok"
        except ClientGone:
            pass
        except Exception as error:
            problem = error if isinstance(error, APIError) else unexpected(error, self._exchange.request_id)
            outcome, reason = "error", f"{type(error).__name__}: {error}" if problem is not error else problem.message
            with contextlib.suppress(TimeoutError):  # of a client that does not read
                await asyncio.wait_for(_event(send, as_json(problem.body), more=False), LAST_WORDS_SECONDS)
            if problem is not error:
                raise  # to be logged
        finally:
            self._gone.cancel()
            await self._events.aclose()
            self._exchange.close(outcome, reason)

    async def _pump(self, send: Send) -> None:
        await _event(send, as_json(self._first))
        async for event in self._events:
            await _event(send, as_json(event))
        await _event(send, b"[DONE]", more=False)


async def _event(send: Send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})


async def answer(
    exchange: Exchange,
    receive: Receive,
    events: AsyncGenerator[dict[str, Any]] | None,
    whole: Callable[[], Coroutine[Any, Any, Any]],
) -> Response:
    """An exchange's end: `events` where it streams, else what `whole` gives."""
    try:
        if events is not None:
            return await EventStream.begin(exchange, events, receive)
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            result = await _in_time(exchange, gone, whole())
        finally:
            gone.cancel()
    except APIError as error:
        exchange.close("rejected" if error.status_code < 500 else "error", error.message)
        raise
    except ClientGone:
        exchange.close("cancelled")
        return Response(status_code=499)
    except BaseException as error:
        exchange.close("error", f"{type(error).__name__}: {error}")
        raise
    exchange.close("ok")
    return JSON(result)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _in_time(exchange: Exchange, gone: "asyncio.Future[None]", work: Awaitable[Result]) -> Result:
    """The result of some work, given up with ClientGone where the client goes first, or APIError where time is up."""
    task: asyncio.Future[Any] = asyncio.ensure_future(work)
    seconds = exchange.service.config.request_seconds
    try:
        left = max(seconds - exchange.meter.seconds, 0)
        await asyncio.wait([task, gone], timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            result: Result = task.result()
            return result
        if gone.done():
            raise ClientGone
        raise APIError(504, f"the request was not answered within {seconds:g} s", code="timeout")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, drafted: int = 0, accepted: int = 0
) -> dict[str, Any]:
    """Drafts are shown where there were any; completion_tokens has those that were accepted, and no others."""
    shown: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    if drafted:
        shown["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        }
    return shown


class Counts:
    """The usage of several prompts, each with its latest figures."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self._prompts = sum(map(len, prompts))
        self._latest: dict[int, tuple[int, int, int, int]] = {}

    def see(self, number: int, progress: Progress, written: bool = True) -> None:
        """written: whether the text is an answer, and not the prompt alone."""
        completion = progress.completion_tokens if written else 0
        self._latest[number] = completion, progress.cached_tokens, progress.drafted, progress.accepted

    def usage(self) -> dict[str, Any]:
        return usage(self._prompts, *map(sum, zip((0, 0, 0, 0), *self._latest.values(), strict=True)))


def prompt_logprobs(progress: Progress) -> list[dict[str, Any] | None]:
    """For each token of a prompt, as vLLM has them."""
    return [
        None if row is None else {str(token): value._asdict() for token, value in row.items()}
        for row in progress.prompt_logprobs or ()
    ]


def check_end(piece: Piece) -> None:
    """APIError for a text that went wrong."""
    if piece.finish_reason in ("error", "cancelled"):
        theirs = str(piece.stop_reason).startswith("the grammar")  # as the sampler says of one that leads nowhere
        raise APIError(
            400 if theirs else 500, f"the text could not be finished: {piece.stop_reason or piece.finish_reason}"
        )


async def with_errors(events: AsyncGenerator[Result]) -> AsyncGenerator[Result]:
    """What engines say, as APIErrors."""
    with as_api_errors():
        async with aclosing(events) as items:
            async for item in items:
                yield item
