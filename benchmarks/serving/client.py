"""A small HTTP/1.1 client that costs little while answers stream in, since it shares the machine with the server.

What arrives is kept with its time and not looked into, beyond finding its end; stream.py reads it when the load is
over. 6 µs of CPU a token where httpx takes 98 (benchmarks/LOG.md).
"""

import asyncio
import base64
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from .stream import head_of

_LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass
class Reply:
    """An answer as it came in, head and all: what each read brought, and when. Times are of time.perf_counter."""

    reads: list[tuple[float, bytes]] = field(default_factory=list)
    complete: bool = False

    @property
    def raw(self) -> bytes:
        return b"".join(data for _, data in self.reads)


class Connection(asyncio.Protocol):
    """One connection, for one request at a time."""

    def __init__(self) -> None:
        self.lost = False
        self._reply = Reply()
        self._done: asyncio.Future[Reply] | None = None

    async def exchange(self, message: bytes) -> Reply:
        self._reply = Reply()
        self._head_seen, self._keeps_alive = False, True
        self._left, self._tail = 0, b""  # of a body whose length was told; the last bytes of one in chunks
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            return await self._done
        finally:
            self._done = None
            if not self._reply.complete or not self._keeps_alive:
                self.close()

    def close(self) -> None:
        self.lost = True
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._reply.reads.append((time.perf_counter(), data))
        if self._head_seen:
            self._left -= len(data)
            self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
        elif not self._read_head():
            return
        if self._left == 0 or (self._chunked and self._tail == _LAST_CHUNK):
            self._finish(complete=True)

    def _read_head(self) -> bool:
        raw = self._reply.raw
        if (head := head_of(raw)) is None:
            return False
        self._head_seen = True
        self._chunked = head.chunked
        self._left = -1 if head.body_bytes is None else head.body_bytes - (len(raw) - head.end)
        self._until_close = head.body_bytes is None and not head.chunked
        self._keeps_alive = head.keeps_alive and not self._until_close
        self._tail = raw[-len(_LAST_CHUNK) :]
        return True

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True
        self._finish(complete=self._done is not None and self._head_seen and self._until_close)

    def _finish(self, complete: bool) -> None:
        if self._done and not self._done.done():
            self._reply.complete = complete
            self._done.set_result(self._reply)


class Client:
    """Requests to one server, over connections that are used again."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the URL is {url!r}; it must be like http://127.0.0.1:8000")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = parts.hostname, parts.port or (443 if self._tls else 80)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        elif parts.username:
            secret = base64.b64encode(f"{parts.username}:{parts.password or ''}".encode()).decode()
            self._headers += f"Authorization: Basic {secret}\r\n"
        self._idle: list[Connection] = []

    def message(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request, as it is sent."""
        kind = "Content-Type: application/json\r\n" if body else ""
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._headers}{kind}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def exchange(self, message: bytes) -> Reply:
        """OSError: no connection. A Reply that is not complete: the connection was lost on the way."""
        while self._idle:
            if (connection := self._idle.pop()).lost:
                continue
            reply = await self._exchange(connection, message)
            if reply.reads:
                return reply
            # The server closed it, being idle, while the request was on its way.
        return await self._exchange(await self._connect(), message)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, *self._address, ssl=self._tls)
        return connection

    async def _exchange(self, connection: Connection, message: bytes) -> Reply:
        reply = await connection.exchange(message)
        if not connection.lost:
            self._idle.append(connection)
        return reply

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
