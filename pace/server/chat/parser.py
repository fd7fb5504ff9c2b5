"""A chat model's text as it grows: what of it is content, what reasoning, and what a call of a tool.

Only what may yet become a tag waits, or a call that is not whole. However the text is cut into pieces, what comes out
is the same; and what looks like a call but is none comes out as content, tags and all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pace.engine.stopping import overlap

from .formats import Format
from .tool_calls import Take, ToolCall, harmony_function, take_json, without_separators


@dataclass(frozen=True)
class Delta:
    """What is new."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class Parser:
    """Reads one reply. tools: whether the request offers any; reasoning: whether thinking is told from content. Without
    them, their tags are content. prompt: what the reply follows, whose end may be the reply's beginning.
    """

    def __init__(self, format: Format, *, tools: bool, reasoning: bool = True, prompt: str = "") -> None:
        self._calls = format.calls if tools else None
        self._thinking = format.thinking if reasoning else None
        self._message_ends = format.calls.closing if format.in_channels else ()
        self._content, self._reasoning = _Flow(), _Flow(trims=True)
        self._new_calls: list[ToolCall] = []
        self._text = ""  # not understood yet
        self._ended = False
        self._read = self._header if format.in_channels else self._beginning
        self.push(format.begun_by(prompt))

    @classmethod
    def of_forced_calls(cls) -> "Parser":
        """For a reply that is a list of calls, since a grammar had it so."""
        parser = cls(Format(), tools=False, reasoning=False)
        parser._open("", take_json, ())
        return parser

    def push(self, text: str) -> Delta:
        self._text += text
        while self._read():
            pass
        calls, self._new_calls = self._new_calls, []
        return Delta(self._content.take(), self._reasoning.take(), tuple(calls))

    def finish(self) -> Delta:
        """No more text comes: thinking that was cut off is reasoning, a call that was cut off content."""
        self._ended = True
        last = self.push("")
        return replace(last, content=last.content + self._content.rest())

    # Each of these reads a part of `_text` from its beginning, and says whether it came to the part's end.

    def _beginning(self) -> bool:
        """Where thinking may begin, or a call without a tag."""
        text = self._text.lstrip()
        if self._thinking and text.startswith(self._thinking.opening):
            self._text = text[len(self._thinking.opening) :]
            self._read = self._think
        elif self._calls and self._calls.bare and text.startswith("{"):
            self._content.write(self._text[: -len(text)])
            self._text = text
            self._open("", self._calls.take, self._calls.closing)
        elif not self._ended and (not text or (self._thinking and self._thinking.opening.startswith(text))):
            return False
        else:
            self._read = self._say
        return True

    def _say(self) -> bool:
        tag = self._until(self._message_ends or (self._calls.opening if self._calls else ()), self._content)
        if tag is not None and self._message_ends:
            self._end_message()
        elif tag is not None and self._calls:
            self._open(tag, self._calls.take, self._calls.closing)
        return tag is not None

    def _think(self) -> bool:
        assert self._thinking
        tag = self._until(self._thinking.closing, self._reasoning)
        if tag is not None:
            self._end_message()
        return tag is not None

    def _end_message(self) -> None:
        self._content.tag()
        self._reasoning.tag()
        self._read = self._header if self._message_ends else self._beginning

    def _header(self) -> bool:
        """What stands before each message of a reply in channels."""
        header, tag, rest = self._text.partition("<|message|>")
        begun = self._text.lstrip()
        if not begun.startswith(_HEADERS) and (self._ended or not any(each.startswith(begun) for each in _HEADERS)):
            self._read = self._say  # a model that does not keep to its format
            return True
        if not tag:
            return False
        self._text = rest
        if self._calls and harmony_function(header):
            self._open(header + tag, self._calls.take, self._calls.closing)
        else:
            self._read = self._think if self._thinking and self._thinking.opening in header else self._say
        return True

    def _open(self, tag: str, take: Take, closing: Sequence[str]) -> None:
        self._tag, self._take, self._closing, self._called = tag, take, closing, False
        self._read = self._call

    def _call(self) -> bool:
        try:
            taken, may_be = self._take(self._tag, self._text), True
        except ValueError:
            taken, may_be = None, False
        if taken:
            self._new_calls.append(taken[0])
            self._text = self._text[taken[1] :]
            self._called = True
            self._content.tag()
        elif close := _outside_strings(self._closing, self._text):
            left = self._text[: close.start()]
            self._content.write(_after_calls(left) if self._called else self._tag + left + close[0])
            self._text = self._text[close.end() :]
            self._read = self._header if self._message_ends else self._beginning
        elif self._ended or not (may_be or self._closing):
            self._content.write("" if self._called else self._tag)
            self._text = _after_calls(self._text) if self._called else self._text
            self._read = self._say
        else:
            return False
        return True

    def _until(self, tags: Sequence[str], flow: "_Flow") -> str | None:
        """Write what stands before the first of the tags, and take the tag away; without one, what can't become one."""
        found = [(at, tag) for tag in tags if (at := self._text.find(tag)) >= 0]
        at, tag = min(found, default=(len(self._text) - self._waiting(tags), None))
        flow.write(self._text[:at])
        self._text = self._text[at + len(tag or "") :]
        return tag

    def _waiting(self, tags: Sequence[str]) -> int:
        return 0 if self._ended else max((overlap(self._text, tag) for tag in tags), default=0)


def _after_calls(text: str) -> str:
    """What is left of it where it only separates calls: nothing."""
    return text if without_separators(text) else ""


_HEADERS = ("<|channel|>", "<|start|>", "<|message|>", "to=")  # how they begin


def _outside_strings(tags: Sequence[str], text: str) -> re.Match[str] | None:
    """The first of the tags that is not in a string of JSON, which may well speak of tags."""
    found = re.finditer("|".join(map(re.escape, tags)), text) if tags else ()
    return next((tag for tag in found if _is_outside_strings(text[: tag.start()])), None)


def _is_outside_strings(text: str) -> bool:
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 0


class _Flow:
    """Text that goes to one place. Whitespace beside a tag is dropped; texts that a tag parts begin on a new line."""

    def __init__(self, trims: bool = False) -> None:
        self._new = ""
        self._space = ""  # comes before the next text
        self._trims = trims  # the space that comes next
        self._begun = False

    def write(self, text: str) -> None:
        if self._trims:
            text = text.lstrip()
        if text:
            text, self._trims = self._space + text, False
            shown = text.rstrip()
            self._new, self._space = self._new + shown, text[len(shown) :]
            self._begun = self._begun or bool(shown)

    def tag(self) -> None:
        self._space, self._trims = "\n" if self._begun else "", True

    def take(self) -> str:
        new, self._new = self._new, ""
        return new

    def rest(self) -> str:
        return "" if self._trims else self._space
