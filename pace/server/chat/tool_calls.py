"""Tool calls as text: what is one, where it ends, and what only looks like one."""

import json
import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NAME = re.compile("[a-zA-Z0-9_-]{1,64}")  # of a function, as OpenAI has it
_ALPHABET = string.ascii_letters + string.digits


def new_id() -> str:
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


@dataclass(frozen=True)
class ToolCall:
    """arguments: a JSON object, as text. Calls are equal that ask for the same."""

    name: str
    arguments: str
    id: str = field(default_factory=new_id, compare=False)


# Takes the tag before some text, and the text: the call at its beginning with its length, or None where more must
# come first. ValueError: whatever comes, the text does not begin with a call.
Take = Callable[[str, str], tuple[ToolCall, int] | None]


def take_json(tag: str, text: str) -> tuple[ToolCall, int] | None:
    """{"name": …, "arguments": {…}}, also with "parameters"; in a list, or one after the other."""
    start = len(text) - len(without_separators(text))
    if not _OBJECT_BEGINS.match(text, start):
        raise ValueError("no JSON object")
    if (found := _object_at(text, start)) is None:
        return None
    called, end = found
    return _call(called.get("name"), called.get("arguments", called.get("parameters"))), end


def take_deepseek(tag: str, text: str) -> tuple[ToolCall, int] | None:
    """A name after a separator, then its arguments in a fence."""
    if _DEEPSEEK_END not in text:
        return None
    if not (found := _DEEPSEEK.match(text)):
        raise ValueError("no call")
    return _call(found["name"], found["arguments"]), found.end()


def take_harmony(tag: str, text: str) -> tuple[ToolCall, int] | None:
    """The arguments alone: the header before them has the name."""
    name = harmony_function(tag)
    if not _OBJECT_BEGINS.match(text.lstrip()):
        raise ValueError("no JSON object")
    found = _object_at(text, len(text) - len(text.lstrip()))
    return found and (_call(name, found[0]), found[1])


def harmony_function(header: str) -> str | None:
    """The function that a message is for."""
    found = re.search(r"to=functions\.([\w-]+)", header)
    return found and found[1]


def without_separators(text: str) -> str:
    """Without what may stand before a call, and between two."""
    return text.lstrip(" \t\r\n[],;")


_OBJECT_BEGINS = re.compile(r'(?:\{[ \t\r\n]*(?:["}]|\Z)|\Z)')
_DEEPSEEK_END = "<｜tool▁call▁end｜>"
_DEEPSEEK = re.compile(
    r"\s*<｜tool▁call▁begin｜>\w*<｜tool▁sep｜>(?P<name>[\w-]+)\s*"
    rf"```(?:json)?\s*(?P<arguments>.*?)\s*```\s*{_DEEPSEEK_END}",
    re.DOTALL,
)


_DECODER = json.JSONDecoder()


def _object_at(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that begins at `start` and where it ends; None where it is not whole, or none."""
    try:
        found, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return (found, end) if isinstance(found, dict) else None


def _call(name: Any, arguments: Any) -> ToolCall:
    """ValueError for what nobody can call. Arguments may be an object or its text."""
    if isinstance(arguments, str):
        arguments = (_object_at(arguments.strip(), 0) or [None])[0]
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
        raise ValueError("a call has a name, and arguments that are an object")
    return ToolCall(name, _json_text(arguments))


def _json_text(value: dict[str, Any]) -> str:
    """ValueError for NaN and infinity, which JSON has not."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only its escape can say
        return json.dumps(value, allow_nan=False)
    return text
