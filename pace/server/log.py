"""The server's log: a line for each thing that happens, for people or for programs. A full disk ends nothing."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any


class Handler(logging.Handler):
    """To stderr, without a buffer, which would fail once more when the process ends. lost: is called for a line that
    could not be written.
    """

    def __init__(self, as_json: bool, lost: Callable[[], None]) -> None:
        super().__init__()
        self._lost = lost
        self.setFormatter(_JSONLine() if as_json else _Line())

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            os.write(sys.stderr.fileno(), line)
        except OSError:
            self._lost()


def figures_of(record: logging.LogRecord) -> dict[str, Any]:
    """What is known beside the message; nothing that is not."""
    return {name: value for name, value in getattr(record, "figures", {}).items() if value is not None}


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        figures = " ".join(f"{name}={_word(value)}" for name, value in figures_of(record).items())
        text = f"{when} {level}{record.getMessage()}{' ' if figures else ''}{figures}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JSONLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _json(line | figures_of(record))


def _word(value: Any) -> str:
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else _json(value)


def _json(value: Any) -> str:
    """Which no reader takes for two lines, and no terminal for a command."""
    text = json.dumps(value, ensure_ascii=False)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


_CONTROLS = re.compile(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_PLAIN = re.compile(rf"[^\0- \"={_CONTROLS.pattern[1:-1]}]+")
