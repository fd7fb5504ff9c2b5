"""What is shown beside the model's own words: errors, warnings and notes, each one line on stderr."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:  # rich is imported where something is shown: it takes a tenth of a second
    from rich.console import Console

INTERRUPTED = 130  # the exit statuses of a shell, for SIGINT and SIGPIPE
BROKEN_PIPE = 141


def stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str, style: str = "dim") -> None:
    stderr().print(text, style=style, markup=False, soft_wrap=True)


def complain(message: str, style: str = "bold red") -> None:
    from rich.text import Text

    line = " ".join(message.splitlines())
    stderr().print(Text.assemble(("pace: ", style), line), soft_wrap=True)


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage(), style="bold yellow")


def show_warnings() -> None:
    """What the library logs is shown as everything else is."""
    logger = logging.getLogger("pace")
    if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
        logger.addHandler(_Warnings())
        logger.propagate = False


@contextmanager
def reported() -> Iterator[None]:
    """Turns what goes wrong into one line and an exit status; PACE_DEBUG=1 leaves the traceback."""
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except BrokenPipeError:
        # Python flushes stdout once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if os.environ.get("PACE_DEBUG") == "1":
            raise
        complain(explain(error))
        raise typer.Exit(1) from None


def explain(error: Exception) -> str:
    match error:
        case MemoryError():
            return f"out of memory ({error})" if str(error) else "out of memory"
        case OSError(filename=str(name), strerror=str(reason)):
            return f"{name}: {reason}"
        case ValueError() | OSError() | RuntimeError() | ImportError():
            return str(error)
        case _:
            return f"{type(error).__name__}: {error} (unexpected; PACE_DEBUG=1 shows where)"
