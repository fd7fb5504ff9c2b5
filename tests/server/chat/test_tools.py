"""Tools and tool_choice: what is refused, and forced calls that really follow their schemas."""

import json
import re

import numpy as np
import pytest

from pace.engine.structured import Grammars
from pace.engine.tokenizer import Tokenizer
from pace.server.chat.parser import Parser
from pace.server.chat.tools import ToolUse, tool_use
from tests.engine.fakes import EOS, FIRST_BYTE, VOCABULARY, byte_tokens, write_tokenizer

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "within": {"$ref": "#/$defs/Place"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/Place"}, "unit": {"enum": ["C", "F"]}},
    "required": ["place", "unit"],
    "additionalProperties": False,
    "$defs": {"Place": PLACE},
}
OTHER = WEATHER | {"properties": {"place": {"$ref": "#/$defs/Place"}}, "required": [], "$defs": {"Place": {"const": 7}}}


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("get_weather", WEATHER), tool("other", OTHER), tool("now")]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
PARIS = '{"name": "get_weather", "arguments": {"place": {"city": "Paris", "within": {"city": "ü"}}, "unit": "C"}}'
SEVEN = '{"name": "other", "arguments": {"place": 7}}'
NOW = '{"name": "now", "arguments": {}}'


@pytest.fixture(scope="module")
def grammars(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return Grammars(Tokenizer.load(path), VOCABULARY, frozenset([EOS]))


def allowed(matcher):
    mask = np.zeros(-(-VOCABULARY // 32), np.int32)
    matcher.allow(mask)
    return {token for token in range(VOCABULARY) if mask[token // 32] >> (token % 32) & 1}


def accepted(grammars, use, text):
    """How much of a text the grammar lets through, and whether it may end there."""
    matcher = grammars.matcher(use.grammar)
    for at, token in enumerate(byte_tokens(text)):
        if token not in allowed(matcher):
            return text.encode()[:at].decode(errors="replace"), False
        matcher.accept(token)
    return text, matcher.complete or EOS in allowed(matcher)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("required",), f"[{PARIS}]"),
        (("required",), f"[{NOW}, {PARIS}, {SEVEN}]"),
        (("required", False), f"[{SEVEN}]"),
        ((NAMED,), f"[{PARIS}]"),
    ],
)
def test_forced_calls(grammars, options, text):
    assert accepted(grammars, tool_use(TOOLS, *options), text) == (text, True)
    calls = Parser.of_forced_calls().push(text).tool_calls
    assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls] == json.loads(text)


@pytest.mark.parametrize(
    ("options", "text", "follows"),
    [
        (("required",), "[]", "["),
        (("required",), "It", ""),
        (("required",), '[{"name": "none"', '[{"name": "no'),
        (("required",), '[{"name": "now", "arguments": {"x"', '[{"name": "now", "arguments": {'),
        (("required",), SEVEN.replace("7", "8"), ""),
        (("required",), f"[{SEVEN}]".replace("7", "8"), f"[{SEVEN}]".partition("7")[0]),
        (("required",), f"[{PARIS}]".replace('"C"', '"K"'), f"[{PARIS}]".partition("C")[0]),
        (("required", False), f"[{NOW}, ", f"[{NOW}"),
        ((NAMED,), f"[{PARIS}, ", f"[{PARIS}"),
        ((NAMED,), f"[{NOW}]", '[{"name": "'),
    ],
)
def test_forced_calls_follow_their_schemas(grammars, options, text, follows):
    assert accepted(grammars, tool_use(TOOLS, *options), text) == (follows, False)


def test_a_drawn_text_is_calls(grammars):
    """Any tokens that the grammar allows."""
    random = np.random.default_rng(7)
    for _ in range(5):
        matcher, parser, calls = grammars.matcher(tool_use(TOOLS, "required").grammar), Parser.of_forced_calls(), []
        text = b""
        while not matcher.complete and len(text) < 400:
            choices = [token - FIRST_BYTE for token in allowed(matcher) if FIRST_BYTE <= token < FIRST_BYTE + 256]
            wanted = [byte for byte in choices if chr(byte) in '"}]'] or choices  # or it never ends
            byte = int(random.choice(wanted if random.random() < 0.7 else choices))
            text += bytes([byte])
            matcher.accept(FIRST_BYTE + byte)
        calls = parser.push(text.decode(errors="replace")).tool_calls
        if matcher.complete:
            assert [call.name for call in calls] == [call["name"] for call in json.loads(text)]


def test_choices():
    assert tool_use(None) == tool_use([], "auto") == tool_use(TOOLS, "none") == ToolUse()
    assert tool_use(TOOLS) == tool_use(TOOLS, "auto") == ToolUse(tuple(TOOLS))
    assert tool_use(TOOLS, "required").shown == tuple(TOOLS)
    assert tool_use(TOOLS, NAMED).grammar == tool_use(TOOLS, NAMED, parallel_tool_calls=False).grammar


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([{"type": "retrieval"}], "auto", "the type 'retrieval'; it must be 'function'"),
        ([{"type": "function"}], "auto", "with a `function`"),
        ([tool("get weather")], "none", "a tool is called 'get weather'; a name is 1 to 64"),
        ([tool("")], "auto", "''"),
        ([tool("é")], "auto", "'é'"),
        ([tool("x" * 65)], "auto", "x; a name|x'; a name"),
        ([tool(None)], "auto", "None"),
        ([tool("f", {"type": "array"})], "auto", "parameters of f are .*'array'.*schema of type 'object'"),
        ([tool("f", [])], "auto", "parameters of f"),
        ([tool("f"), tool("f")], "auto", "two tools are called 'f'"),
        ([], "required", "no tools; give tools"),
        (
            TOOLS,
            {"type": "function", "function": {"name": "nothing"}},
            "'nothing', which is not .*: get_weather, other",
        ),
        ([], NAMED, "'get_weather', which is not .*: none"),
        (TOOLS, "any", "tool_choice is 'any'; it must be 'none', 'auto', 'required'"),
        (TOOLS, {"type": "function"}, "tool_choice is"),
        (TOOLS, {"type": "custom", "function": {"name": "now"}}, "tool_choice is"),
        (TOOLS, 7, "tool_choice is 7"),
    ],
)
def test_refusals(tools, choice, message):
    with pytest.raises(ValueError) as error:
        tool_use(tools, choice)
    assert re.search(message, str(error.value))


def test_the_names_limit_is_64():
    assert tool_use([tool("x" * 64)]).shown
