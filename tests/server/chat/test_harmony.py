"""GPT-OSS's format against OpenAI's own library: chats without a template, and replies."""

import json
import sys

import openai_harmony as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from pace.engine.harmony import SPECIAL_TOKENS, render
from pace.engine.tokenizer import Tokenizer
from pace.errors import ModelError
from pace.server.chat.formats import HARMONY, format_of
from pace.server.chat.parser import Delta, Parser

ENCODING = oracle.load_harmony_encoding(oracle.HarmonyEncodingName.HARMONY_GPT_OSS)
ASSISTANT = oracle.Role.ASSISTANT
WEATHER = {
    "name": "get_weather",
    "description": "The weather now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CHAT = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "How is Paris?"},
    {
        "role": "assistant",
        "content": "One moment.",
        "reasoning_content": "I ask for it.",
        "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "12 °C"},
]


def tokenizer(tokens=SPECIAL_TOKENS, templates=None):
    backend = Backend(models.WordLevel({"?": 0, **{token: i for i, token in enumerate(tokens, 1)}}, unk_token="?"))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, chat_templates=templates)


def test_a_chat():
    text = tokenizer().chat_text(CHAT, tools=[{"type": "function", "function": WEATHER}], reasoning_effort="high")
    system, _, rest = text.partition("<|end|>")
    assert "Reasoning: high" in system
    assert "Calls to these tools must go to the commentary channel: 'functions'." in system
    assert rest == (
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\n## functions\n\n"
        "namespace functions {\n\n"
        "// The weather now.\ntype get_weather = (_: {\ncity: string,\n}) => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>How is Paris?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>I ask for it.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Zürich"}<|call|>'
        "<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>12 °C<|end|><|start|>assistant"
    )


def test_what_is_thought_before_an_answer_is_not_said_again():
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "thinking": "Easy.", "content": "2"}]
    assert "Easy" not in render([*chat, {"role": "user", "content": "2+2?"}])
    assert render(chat, add_generation_prompt=False).endswith("<|channel|>final<|message|>2<|end|>")


def test_a_template_comes_first():
    ours = tokenizer(templates={"default": "{{ messages[0].content }}"})
    assert ours.chat_text(CHAT) == "Be brief."
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer(tokens=["<|start|>"]).chat_text(CHAT)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai_harmony", None)
    with pytest.raises(ImportError, match=r"needs oss-harmony: pip install 'pace\[harmony\]'"):
        render(CHAT)


def test_an_effort_that_is_none():
    with pytest.raises(ValueError, match=r"reasoning_effort is 'hard'; it must be .*low"):
        render(CHAT, reasoning_effort="hard")


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="<|>"), min_size=1)
CITIES = st.text("abcü \"'\\{}", max_size=8)


@st.composite
def replies(draw):
    """The messages of one reply."""
    messages = []
    for kind in draw(st.lists(st.sampled_from(["analysis", "preamble", "call"]), max_size=3)):
        text = draw(TEXT)
        message = oracle.Message.from_role_and_content(ASSISTANT, text)
        if kind == "call":
            message = oracle.Message.from_role_and_content(ASSISTANT, f'{{"city": {json.dumps(draw(CITIES))}}}')
            message = message.with_recipient("functions.get_weather").with_content_type("<|constrain|>json")
        messages.append(message.with_channel("analysis" if kind == "analysis" else "commentary"))
    final = oracle.Message.from_role_and_content(ASSISTANT, draw(TEXT)).with_channel("final")
    return [*messages, final]


def theirs(tokens):
    """What the library's own parser makes of a reply."""
    parser = oracle.StreamableParser(ENCODING, ASSISTANT)
    for token in tokens:
        parser.process(token)
    said = {"analysis": [], "content": []}
    calls = []
    for message in parser.messages:
        (content,) = message.content
        if message.recipient:
            calls.append((message.recipient.removeprefix("functions."), json.loads(content.text)))
        else:
            said["analysis" if message.channel == "analysis" else "content"].append(content.text)
    return said, calls


@given(reply=replies(), cut=st.integers(1, 9))
def test_replies_are_read_as_the_library_reads_them(reply, cut):
    options = oracle.RenderConversationConfig(auto_drop_analysis=False)
    tokens = ENCODING.render_conversation(oracle.Conversation.from_messages(reply), config=options)
    text = ENCODING.decode_utf8(tokens).removeprefix("<|start|>assistant")
    parser = Parser(format_of(tokenizer()), tools=True)
    deltas = [*(parser.push(text[at : at + cut]) for at in range(0, len(text), cut)), parser.finish()]
    said, calls = theirs(ENCODING.encode(text, allowed_special="all"))
    assert [(call.name, json.loads(call.arguments)) for delta in deltas for call in delta.tool_calls] == calls
    found = Delta("".join(d.content for d in deltas), "".join(d.reasoning for d in deltas))
    # Messages of one channel follow each other without what would keep them apart but blanks.
    assert "".join(found.reasoning.split()) == "".join("".join(said["analysis"]).split())
    assert "".join(found.content.split()) == "".join("".join(said["content"]).split())


def test_the_format_takes_tools():
    assert format_of(tokenizer()).calls is HARMONY
    assert format_of(tokenizer()).tools_go == "variable"
