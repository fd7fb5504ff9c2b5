"""The server's log: a line for each thing that happens, for people or for programs. A full disk ends nothing."""

import json
import logging
import os
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
        return json.dumps(line | figures_of(record), ensure_ascii=False)


def _word(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or set(text) & set(' "\n\r=') else text
