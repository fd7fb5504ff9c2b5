"""What a streamed answer says, and when it said it: HTTP's head and chunks, server-sent events, OpenAI's fields.

Works on bytes that have arrived with their times. A token is not parsed for while the load is on.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Head:
    status: int
    end: int  # where the body begins
    chunked: bool
    body_bytes: int | None  # where it was told
    keeps_alive: bool


def head_of(raw: bytes) -> Head | None:
    """None where it has not come in whole."""
    end = raw.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = raw[:end].decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    chunked = "chunked" in fields.get("transfer-encoding", "").lower()
    length = fields.get("content-length")
    return Head(
        status=int(first.split(" ", 2)[1]),
        end=end + 4,
        chunked=chunked,
        body_bytes=int(length) if length is not None and not chunked else None,
        keeps_alive=fields.get("connection", "").lower() != "close" and not first.startswith("HTTP/1.0"),
    )


class Chunks:
    """Takes the chunks of a body apart, wherever the reads cut them."""

    def __init__(self) -> None:
        self._pending = b""
        self._left = 0  # of the chunk that is coming in, with the line end behind it

    def feed(self, data: bytes) -> bytes:
        """What of the body this completes."""
        body = []
        self._pending += data
        while self._pending:
            if self._left == 0:
                line, found, rest = self._pending.partition(b"\r\n")
                if not found:
                    break
                size = int(line.partition(b";")[0], 16)
                if size == 0:
                    break
                self._left, self._pending = size + 2, rest
            part = self._pending[: self._left]
            body.append(part[: max(0, self._left - 2)])
            self._left -= len(part)
            self._pending = self._pending[len(part) :]
        return b"".join(body)


def body_reads(reads: Iterable[tuple[float, bytes]], head: Head) -> Iterator[tuple[float, bytes]]:
    """The reads without the head and without the chunks' sizes."""
    skip, chunks = head.end, Chunks()
    for at, data in reads:
        part, skip = data[skip:], max(0, skip - len(data))
        if part:
            yield at, chunks.feed(part) if head.chunked else part


def events(reads: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, with the time of the read that completed its line."""
    pending = b""
    for at, data in reads:
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line[5:].strip()


@dataclass(frozen=True)
class Answer:
    """Of one request: when text came, when its end was told, and the server's own count of tokens."""

    text_times: tuple[float, ...]
    end: float | None
    prompt_tokens: int | None
    output_tokens: int | None
    error: str | None


def answer_of(body: Iterable[tuple[float, bytes]]) -> Answer:
    texts: list[float] = []
    usage: dict[str, int] = {}
    end, error = None, None
    for at, data in events(body):
        if data == b"[DONE]":
            end = end or at
            continue
        event = json.loads(data)
        if event.get("error"):
            error = "error in the stream"
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            if _has_text(choice):
                texts.append(at)
            if choice.get("finish_reason"):
                end = at
    return Answer(tuple(texts), end, usage.get("prompt_tokens"), usage.get("completion_tokens"), error)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    said = (choice.get("text"), *(delta.get(name) for name in ("content", "reasoning_content", "reasoning")))
    return any(said) or bool(delta.get("tool_calls"))
