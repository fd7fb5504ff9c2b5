"""Replies as models write them, whole and in any pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pace.server.chat.formats import CALLS, DEEPSEEK, HARMONY, HERMES, LLAMA3_JSON, PHI4_MINI, THINKING, Format
from pace.server.chat.parser import Delta, Parser
from pace.server.chat.tool_calls import ToolCall

HERMES_PLAIN, QWEN3 = Format(HERMES), Format(HERMES, THINKING["qwen3"])
LLAMA, PHI = Format(LLAMA3_JSON), Format(PHI4_MINI)
R1, GPT_OSS = Format(DEEPSEEK, THINKING["deepseek_r1"]), Format(HARMONY, THINKING["harmony"])
FORMATS = [HERMES_PLAIN, QWEN3, LLAMA, PHI, R1, GPT_OSS]
PARIS = ToolCall("get_weather", '{"city": "Paris"}')
ROME = ToolCall("get_weather", '{"city": "Rome", "days": [1, 2]}')
R1_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{}\n```<｜tool▁call▁end｜>"


def r1_call(arguments):
    return R1_CALL.replace("{}", arguments)


def read(parser, pieces):
    """Everything that came of the pieces."""
    deltas = [*map(parser.push, pieces), parser.finish()]
    return Delta(
        "".join(delta.content for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        tuple(call for delta in deltas for call in delta.tool_calls),
    )


def parsed(format, text, **options):
    return read(Parser(format, **({"tools": True} | options)), [text])


SAMPLES = {
    "text": (QWEN3, "  Hello,\n\nworld \n", Delta("  Hello,\n\nworld \n")),
    "thinking": (QWEN3, "<think>\nHm, ü?\n</think>\n\nHallo!", Delta("Hallo!", "Hm, ü?")),
    "thinking after a blank": (QWEN3, "\n <think>a</think>b", Delta("b", "a")),
    "thinking cut off": (QWEN3, "<think>\nHm, </thi", Delta("", "Hm, </thi")),
    "no thoughts": (QWEN3, "<think>\n\n</think>\n\nHi", Delta("Hi")),
    "speaks of thinking": (QWEN3, "The tag is <think>, not </think>.", Delta("The tag is <think>, not </think>.")),
    "hermes": (
        HERMES_PLAIN,
        'One moment.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        Delta("One moment.", "", (PARIS,)),
    ),
    "hermes, two": (
        QWEN3,
        '<think>two</think>\n<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>\n'
        '<tool_call>\n{"arguments": {"city": "Rome", "days": [1,2]}, "name": "get_weather"}\n</tool_call>\n',
        Delta("", "two", (PARIS, ROME)),
    ),
    "hermes, a list": (
        HERMES_PLAIN,
        '<tool_call>[\n{"name": "get_weather", "arguments": {"city": "Paris"}},\n'
        '{"name": "get_weather", "arguments": {"city": "Rome", "days": [1, 2]}}\n]</tool_call>',
        Delta("", "", (PARIS, ROME)),
    ),
    "hermes, arguments as text": (
        HERMES_PLAIN,
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        Delta("", "", (PARIS,)),
    ),
    "hermes, ended by the end": (
        HERMES_PLAIN,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}',
        Delta("", "", (PARIS,)),
    ),
    "hermes, text between and after": (
        HERMES_PLAIN,
        'a \n<tool_call>{"name": "f", "arguments": {}}</tool_call> \n b <tool_call>{"name": "g", "arguments": {}}'
        "</tool_call>\n\nc ",
        Delta("a\nb\nc ", "", (ToolCall("f", "{}"), ToolCall("g", "{}"))),
    ),
    "hermes, a blank before": (
        HERMES_PLAIN,
        '\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\nx',
        Delta("x", "", (ToolCall("f", "{}"),)),
    ),
    "hermes, a tag in a string": (
        HERMES_PLAIN,
        '<tool_call>{"name": "f", "arguments": {"x": "\\"</tool_call>{ü🙂"}}</tool_call>',
        Delta("", "", (ToolCall("f", '{"x": "\\"</tool_call>{ü🙂"}'),)),
    ),
    "hermes, half a surrogate pair": (
        HERMES_PLAIN,
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        Delta("", "", (ToolCall("f", '{"x": "\\ud800"}'),)),
    ),
    "hermes, a brace too many": (
        HERMES_PLAIN,
        '<tool_call>{"name": "f", "arguments": {}}}</tool_call>',
        Delta("}", "", (ToolCall("f", "{}"),)),
    ),
    "llama": (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris"}}', Delta("", "", (PARIS,))),
    "llama, tag": (
        LLAMA,
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        Delta("", "", (PARIS,)),
    ),
    "llama, two": (
        LLAMA,
        '\n{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_weather", "parameters": {"city": "Rome", "days": [1, 2]}}',
        Delta("", "", (PARIS, ROME)),
    ),
    "llama, text after": (
        LLAMA,
        '{"name": "get_weather", "parameters": {"city": "Paris"}}\n\nDone {x}.',
        Delta("Done {x}.", "", (PARIS,)),
    ),
    "llama, JSON that calls nothing": (LLAMA, ' {"name": "Ann"}, she', Delta(' {"name": "Ann"}, she')),
    "llama, no JSON": (LLAMA, "{x} is a set", Delta("{x} is a set")),
    "llama, no JSON before a call": (
        LLAMA,
        '{x} <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
        Delta("{x}", "", (PARIS,)),
    ),
    "llama, its own tools": (
        LLAMA,
        '<|python_tag|>search.call(query="x")',
        Delta('<|python_tag|>search.call(query="x")'),
    ),
    "phi": (
        PHI,
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>',
        Delta("", "", (PARIS,)),
    ),
    "phi, functools": (
        PHI,
        'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        Delta("", "", (PARIS,)),
    ),
    "deepseek": (
        R1,
        "<think>\nHm.\n</think>\n\nI'll look.<｜tool▁calls▁begin｜>"
        + r1_call('{"city": "Paris"}')
        + "\n"
        + r1_call('{"city": "Rome",\n "days": [1, 2]}')
        + "<｜tool▁calls▁end｜>",
        Delta("I'll look.", "Hm.", (PARIS, ROME)),
    ),
    "deepseek, bad arguments": (
        R1,
        "<｜tool▁calls▁begin｜>" + r1_call("{city}") + "<｜tool▁calls▁end｜> so",
        Delta("<｜tool▁calls▁begin｜>" + r1_call("{city}") + "<｜tool▁calls▁end｜> so"),
    ),
    "harmony": (
        GPT_OSS,
        "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>",
        Delta("2 + 2 = 4.", "Simple."),
    ),
    "harmony, a call": (
        GPT_OSS,
        "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city":"Paris"}<|call|>',
        Delta("", "Need it.", (PARIS,)),
    ),
    "harmony, the recipient first": (
        GPT_OSS,
        ' to=functions.get_weather<|channel|>commentary json<|message|>\n{"city":"Paris"}',
        Delta("", "", (PARIS,)),
    ),
    "harmony, a preamble": (
        GPT_OSS,
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>I'll look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>So.",
        Delta("I'll look.\nSo.", "a\nb"),
    ),
    "harmony, a call cut off": (
        GPT_OSS,
        '<|channel|>commentary to=functions.f json<|message|>{"city": "Pa',
        Delta('<|channel|>commentary to=functions.f json<|message|>{"city": "Pa'),
    ),
    "harmony, a header cut off": (GPT_OSS, "<|channel|>ana", Delta()),
    "harmony, an empty header": (GPT_OSS, "<|message|>Hi", Delta("Hi")),
    "harmony, no header": (GPT_OSS, "top <b>", Delta("top <b>")),
}

NO_CALLS = [
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    '<tool_call>{"name": "f"}</tool_call> \n x',
    ' <tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "f g", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 100_000,
    "<tool_call>f()</tool_call>",
    "<tool_call></tool_call>",
    "x <tool_call>\n",
    '<tool_call>{"name": "f", "arguments": {"x": "',
    '<tool_call>{"name": "f", "arguments": {}</tool_call> \n',
    "a < b <tool <tool_cal",
]


@pytest.mark.parametrize(("format", "text", "expected"), SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_samples(format, text, expected, size):
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert read(Parser(format, tools=True), pieces) == expected


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_content_to_the_letter(text):
    assert parsed(HERMES_PLAIN, text) == Delta(text)


def test_a_call_after_one_that_is_none():
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert parsed(HERMES_PLAIN, "<tool_call>{}</tool_call>" + call) == Delta("<tool_call>{}</tool_call>", "", (PARIS,))


# Pieces of tags and of JSON, so that anything may follow anything.
TAGS = [tag for calls in CALLS.values() for tag in (*calls.opening, *calls.closing)]
TAGS += ["<think>", "</think>", "<|start|>assistant", "<|channel|>analysis", "<|channel|>final", "<|message|>"]
TAGS += [" to=functions.f", r1_call("{}"), '{"name": "f", "arguments": {"x": 1}}', '{"name": ', '{"x": "']
SOUP = st.lists(
    st.sampled_from([*TAGS, " ", "\n", "ü", "x", "<", "<|", '"', "}", "{", ";", "[", "]", "\\"]), max_size=8
)


@st.composite
def cut(draw, texts):
    """A text and the same in pieces."""
    text = draw(texts)
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    return text, [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.calls.name}-{bool(format.thinking)}")
@given(cut=cut(SOUP.map("".join)))
def test_however_it_is_cut(format, cut):
    text, pieces = cut
    assert read(Parser(format, tools=True), pieces) == parsed(format, text)


@pytest.mark.parametrize("format", FORMATS[:-1], ids=lambda format: f"{format.calls.name}-{bool(format.thinking)}")
@given(cut=cut(SOUP.map("".join)))
def test_nothing_is_told_apart_unless_asked(format, cut):
    text, pieces = cut
    assert read(Parser(format, tools=False, reasoning=False), pieces) == Delta(text)


@given(text=SOUP.map("".join))
def test_nothing_is_lost(text):
    found = parsed(HERMES_PLAIN, text)
    if not found.tool_calls:
        assert found.content == text


def test_harmony_without_tools_and_reasoning_is_content():
    text, *_ = [text for name, (_, text, _) in SAMPLES.items() if name == "harmony, a call"]
    assert parsed(GPT_OSS, text, tools=False, reasoning=False) == Delta('Need it.\n{"city":"Paris"}')


def test_only_what_may_become_a_tag_waits():
    parser = Parser(QWEN3, tools=True)
    assert parser.push("Hi") == Delta("Hi")
    assert parser.push(" there <tool") == Delta(" there")
    assert parser.push("box") == Delta(" <toolbox")
    thinking = Parser(QWEN3, tools=True)
    assert thinking.push("<think>Hm") == Delta("", "Hm")
    assert thinking.push("</th") == Delta()
    assert thinking.push("ink>So") == Delta("So")
    assert Parser(LLAMA, tools=True).push("{x} ") == Delta("{x}")


def test_calls_come_when_they_are_complete():
    parser = Parser(HERMES_PLAIN, tools=True)
    assert parser.push('<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}') == Delta()
    assert parser.push("}, {") == Delta("", "", (PARIS,))


@pytest.mark.parametrize(
    ("format", "prompt", "text", "expected"),
    [
        (R1, "<｜User｜>hi<｜Assistant｜><think>\n", "Hm.\n</think>\n\nHi", Delta("Hi", "Hm.")),
        (R1, "<｜User｜>hi<｜Assistant｜><think>\n", "Hm.", Delta("", "Hm.")),
        (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "Hi", Delta("Hi")),
        (QWEN3, "<|im_start|>assistant\n", "Hi", Delta("Hi")),
        (GPT_OSS, "<|start|>user<|message|>hi<|end|><|start|>assistant", "Hi", Delta("Hi")),
        (GPT_OSS, "<|channel|>analysis<|message|>", "Hi", Delta("Hi")),  # not of the reply
        (GPT_OSS, "…<|start|>assistant<|channel|>analysis<|message|>", "a<|end|>", Delta("", "a")),
    ],
)
def test_a_prompt_may_begin_the_reply(format, prompt, text, expected):
    assert parsed(format, text, prompt=prompt) == expected


def test_without_reasoning_a_prompt_that_opens_it_changes_nothing():
    assert parsed(R1, "Hm.</think>Hi", prompt="<think>\n", reasoning=False) == Delta("Hm.</think>Hi")


@given(cut=cut(st.sampled_from(['[{"name": "get_weather", "arguments": {"city": "Paris"}}]', '[{"name": "f"', "[]"])))
def test_forced_calls(cut):
    text, pieces = cut
    whole = {"[]": Delta("[]"), '[{"name": "f"': Delta('[{"name": "f"')}
    assert read(Parser.of_forced_calls(), pieces) == whole.get(text, Delta("", "", (PARIS,)))


def test_each_call_has_its_id():
    text = '<tool_call>[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]</tool_call>'
    first, second = (call.id for call in parsed(HERMES_PLAIN, text).tool_calls)
    assert first != second
    assert first.startswith("call_")
    assert len(first) == len("call_") + 24
    assert json.loads(parsed(HERMES_PLAIN, text).tool_calls[0].arguments) == {}
