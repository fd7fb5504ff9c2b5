"""A process that loads a model once and forks an engine from it for each place: they all read the same weights.

Front → node: a line of JSON for each engine to start, on stdin. Node → front: Loaded, then Started and Ended for each
engine's process, on stdout. An engine that dies is forked anew, with nothing to load. Where stdin ends, the front
process has gone, and so go the engines.
"""

import ctypes
import gc
import logging
import os
import selectors
import signal
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn

import msgspec

from pace.engine.engine import Engine
from pace.engine.loader import LoadedModel, default_cache_bytes, load_shared
from pace.numa import Place, occupy

from .worker import work

logger = logging.getLogger("pace")


class NodeSettings(msgspec.Struct, frozen=True):
    """The first line. `place` is that of all engines of the node, None for where the system puts them."""

    model: str
    dtype: str
    operators: str | None
    place: Place | None
    engine: dict[str, Any]  # the arguments of LoadedModel.engine
    engines: int = 1  # of all nodes, which share the memory
    progress: bool = False
    speculative: str | None = None


class Start(msgspec.Struct, frozen=True):
    engine: int
    place: Place | None
    wishes: str
    news: str


class Loaded(msgspec.Struct, tag=True, frozen=True):
    error: str | None = None


class Started(msgspec.Struct, tag=True, frozen=True):
    engine: int
    pid: int


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Said by an engine that can't begin, before its process ends."""

    engine: int
    reason: str


class Ended(msgspec.Struct, tag=True, frozen=True):
    """status: as os.waitstatus_to_exitcode gives it, below zero for a signal."""

    engine: int
    status: int


Report = Loaded | Started | Failed | Ended

PR_SET_PDEATHSIG = 1  # of Linux's prctl
LONGEST_REASON = 1000  # characters: lines of several processes must not mix in the pipe


def main() -> None:
    """The node's process. Signals are the front process's to act on; in a terminal all processes get them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    commands, reports = os.fdopen(0, "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever prints something prints it beside the logs
    settings = msgspec.json.decode(_line(commands), type=NodeSettings)
    try:
        loaded = _load(settings)
    except (ValueError, OSError, MemoryError) as error:
        _report(reports, Loaded(_reason(error)))
        return
    gc.collect()
    gc.freeze()  # or a collection in an engine would write to every object, and copy its page
    _report(reports, Loaded())
    _Node(settings, loaded, commands, reports).run()


def _load(settings: NodeSettings) -> LoadedModel:
    if settings.place is not None:
        occupy(settings.place)
    return load_shared(settings.model, settings.dtype, settings.operators, settings.progress, settings.speculative)


class _Node:
    def __init__(self, settings: NodeSettings, loaded: LoadedModel, commands: Any, reports: Any) -> None:
        self.settings, self.loaded, self._commands, self._reports = settings, loaded, commands, reports
        self._options = settings.engine
        if self._options.get("kv_cache_bytes") is None:  # once: an engine that begins anew gets no less
            self._options = self._options | {"kv_cache_bytes": default_cache_bytes() // settings.engines}
        self._engines: dict[int, int] = {}  # by process
        self._life, self._held = os.pipe()  # the engines see its end when this process ends

    def run(self) -> None:
        bell, ring = os.pipe()
        os.set_blocking(ring, False)
        signal.set_wakeup_fd(ring)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._commands, selectors.EVENT_READ)
            selector.register(bell, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd == bell:
                        os.read(bell, 512)
                        self._reap()
                    elif line := _line(self._commands):
                        self._start(msgspec.json.decode(line, type=Start))
                    else:
                        self._end()

    def _start(self, start: Start) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            _report(self._reports, Failed(start.engine, f"no process can be forked for it: {_reason(error)}"))
            _report(self._reports, Ended(start.engine, 1))
            return
        if pid == 0:
            self._become(start)
        self._engines[pid] = start.engine
        _report(self._reports, Started(start.engine, pid))

    def _become(self, start: Start) -> NoReturn:
        """The engine's process, from here to its end."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._commands.close()
            os.close(self._held)
            _end_with(self._life)
            _die_with_parent()
            if start.place is not None:
                occupy(start.place)
            engine = self._engine(start.engine)
            self._reports.close()
            work(engine, start.wishes, start.news)
            status = 0
        except SystemExit:
            pass
        except BaseException:
            logger.exception("engine %d ends", start.engine)
        finally:
            os._exit(status)

    def _engine(self, index: int) -> Engine:
        try:
            return self.loaded.engine(**self._options)
        except (ValueError, OSError, MemoryError) as error:
            reason = _reason(error)
            if isinstance(error, MemoryError) and "kv_cache_bytes" not in reason:
                reason += f": kv_cache_bytes is {self._options['kv_cache_bytes']}; give less"
            _report(self._reports, Failed(index, reason))
            raise SystemExit from None

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                _report(self._reports, Ended(self._engines.pop(pid), os.waitstatus_to_exitcode(status)))

    def _end(self) -> NoReturn:
        for pid in self._engines:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(0)


def _end_with(life: int) -> None:
    """End this process when the other end of a pipe is closed."""

    def watch() -> None:
        os.read(life, 1)
        os._exit(0)

    threading.Thread(target=watch, name="pace-life", daemon=True).start()


def _die_with_parent() -> None:
    """Where the system can do that, also for a process that is stopped, or too busy to see a pipe's end."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "…"


def _line(stream: Any) -> bytes:
    line: bytes = stream.readline()
    return line


def _report(stream: Any, report: Report) -> None:
    with suppress(BrokenPipeError):
        stream.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
