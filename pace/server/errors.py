"""What goes wrong, as OpenAI's API says it."""

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


LONGEST = 1000  # characters of a message, which may name what the client sent


class APIError(HTTPException):
    """code: a word for programs; param: the field at fault; retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        more = {} if retry_after is None else {"Retry-After": str(retry_after)}
        more |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        self.message, self.code, self.param = _sayable(message), code, None if param is None else _sayable(param)
        super().__init__(status, self.message, {**(headers or {}), **more})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unexpected(error: Exception, request_id: str) -> APIError:
    """What a client is told of a fault of the server's own."""
    return APIError(500, f"{type(error).__name__}: see the server's log, request {request_id}")


def _sayable(text: str) -> str:
    """With ? for half of a surrogate pair, which no answer can hold; cut where it is too long to read."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return text.encode(errors="replace").decode()
