"""A request's text as it grows: what may be shown already, and where a stop string ends it."""

from collections.abc import Sequence

from .tokenizer import Detokenizer


class TextStream:
    """Tokens in, text out. `text` holds only what is final: no half characters, and no beginning of a stop string."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str], include_stop: bool) -> None:
        self._detokenizer, self._stop, self._include_stop = detokenizer, stop, include_stop
        self._held = ""  # may yet become a stop string
        self.text = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> None:
        """The next token; `stopped_by` is set where its text completes a stop string."""
        self._add(self._detokenizer.push(token))

    def finish(self) -> None:
        """No more tokens come: what was held back is text."""
        if self.stopped_by is None:
            self._add(self._detokenizer.flush())
        if self.stopped_by is None:
            self.text += self._held
            self._held = ""

    def _add(self, piece: str) -> None:
        pending = self._held + piece
        found = [(at, stop) for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda place: (place[0], -len(place[1])))
            self.text += pending[: at + len(stop)] if self._include_stop else pending[:at]
            self.stopped_by, self._held = stop, ""
            return
        keep = max((overlap(pending, stop) for stop in self._stop), default=0)
        self.text += pending[: len(pending) - keep]
        self._held = pending[len(pending) - keep :]


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that stop begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
