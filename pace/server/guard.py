"""What every request goes through before a route sees it, as plain ASGI: an id, the key, the body's size and time."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .errors import APIError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready")  # for those who look after the server, and hold no key
_LAST = {"Connection": "close"}  # what is left of a body is not waited for
_ID = re.compile(r"[!-~]{1,128}")


class Guard:
    """keys: none for a server that is open to whoever reaches it."""

    def __init__(self, app: App, keys: Sequence[str], max_body_bytes: int, body_seconds: float) -> None:
        self._app, self._max_body_bytes, self._body_seconds = app, max_body_bytes, body_seconds
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _ID.fullmatch(request_id):
            request_id = secrets.token_hex(12)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id  # a body may bring another

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", state["request_id"].encode())]
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            self._check_length(int(headers["content-length"]) if headers.get("content-length", "").isdecimal() else 0)
        except APIError as error:
            challenge = {"WWW-Authenticate": 'Basic realm="pace"'} if scope["path"] == "/" else {}
            response = JSONResponse(error.body, error.status_code, {**(error.headers or {}), **challenge})
            await response(scope, receive, send_with_id)
            return
        await self._app(scope, self._counted(receive), send_with_id)

    def _check_key(self, path: str, headers: Headers) -> None:
        """The key comes as a bearer token, or as the password of HTTP's basic form, which browsers ask for."""
        if not self._keys or path in OPEN:
            return
        kind, _, value = headers.get("authorization", "").partition(" ")
        given = _digest({"bearer": value.strip(), "basic": _password(value)}.get(kind.lower(), ""))
        # Every key is compared, and in constant time, so that the time taken says nothing.
        if sum(hmac.compare_digest(given, key) for key in self._keys) == 0:
            raise APIError(401, "give a valid API key: Authorization: Bearer KEY", code="invalid_api_key")

    def _check_length(self, size: int) -> None:
        if size > self._max_body_bytes:
            message = f"the body is larger than {self._max_body_bytes} bytes"
            raise APIError(413, message, code="request_too_large", headers=_LAST)

    def _counted(self, receive: Receive) -> Receive:
        seen, more = 0, True
        deadline = asyncio.get_running_loop().time() + self._body_seconds

        async def counted() -> Message:
            nonlocal seen, more
            try:
                async with asyncio.timeout_at(deadline if more else None):
                    message = await receive()
            except TimeoutError:
                problem = f"the body did not come within {self._body_seconds:g} s"
                raise APIError(408, problem, code="timeout", headers=_LAST) from None
            more = message.get("more_body", False)
            seen += len(message.get("body", b""))
            self._check_length(seen)
            return message

        return counted


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _password(value: str) -> str:
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
