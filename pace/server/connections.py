"""Connections that cost what they are worth: as many as the system allows, and none that only waits."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

IDLE_SECONDS = 75  # longer than the 60 s after which most proxies close an idle connection themselves


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's, which is closed where no request begins for long, whatever bytes come."""

    _next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._look_later(seen=None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def _look_later(self, seen: Any) -> None:
        self._next_look = self.loop.call_later(IDLE_SECONDS, self._look, seen)

    def _look(self, seen: Any) -> None:
        """seen: the request that had been answered already when this was last called; None for none."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is seen:
            self.transport.close()
        else:
            self._look_later(self.cycle if idle else self)


def allow_many() -> None:
    """Open files up to what the system allows without asking; the usual 1024 are a thousand connections."""
    try:
        import resource
    except ModuleNotFoundError:  # not everywhere
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
