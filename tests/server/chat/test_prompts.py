"""Messages as templates can take them."""

import json

import pytest

from pace.engine.chat_template import compile_template, render
from pace.server.chat.formats import detect
from pace.server.chat.parser import Parser
from pace.server.chat.prompts import prompt_messages

from . import templates

TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Wetter: ü", "parameters": {}}}]
ASSISTANT = {
    "role": "assistant",
    "content": None,
    "refusal": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
    ],
}
HISTORY = [
    {"role": "user", "content": "And in Rome?"},
    ASSISTANT,
    {"role": "tool", "tool_call_id": "1", "content": "sun"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "rain"}]},
    {"role": "user", "content": "Thanks."},
]


def prompt(template, messages, tools=TOOLS):
    chat, variable = prompt_messages(messages, tools, detect(template))
    return render(compile_template(template), messages=chat, tools=variable, add_generation_prompt=True)


@pytest.mark.parametrize(
    "name", ["CHATML", "QWEN25", "QWEN3", "LLAMA31", "PHI4_MINI", "R1_DISTILL", "GEMMA3", "GPT_OSS"]
)
def test_a_whole_history(name):
    text = prompt(getattr(templates, name), HISTORY)
    for part in ("And in Rome?", "Wetter: ü", '{"city": "Paris"}', '{"city": "Rome"}', "Thanks."):
        assert part in text
    assert text.index("Paris") < text.index("sun") < text.index("rain") < text.index("Thanks.")
    assert "None" not in text


@pytest.mark.parametrize("name", ["CHATML", "GEMMA3", "PHI4_MINI", "R1_DISTILL"])
def test_calls_are_written_as_they_are_read(name):
    format = detect(getattr(templates, name))
    chat, variable = prompt_messages(HISTORY, TOOLS, format)
    assert variable is None
    written = next(message["content"] for message in chat if message["role"] == "assistant")
    calls = Parser(format, tools=True).push(written).tool_calls
    assert [call.arguments for call in calls] == ['{"city": "Paris"}', '{"city": "Rome"}']


def test_tools_are_described_in_the_system_message():
    format = detect(templates.CHATML)
    (system, user), _ = prompt_messages([{"role": "user", "content": "hi"}], TOOLS, format)
    assert user == {"role": "user", "content": "hi"}
    assert system["role"] == "system"
    assert json.dumps(TOOLS[0]["function"], ensure_ascii=False) in system["content"]
    assert "<tool_call>\n" in system["content"]
    merged, _ = prompt_messages([{"role": "system", "content": "Be brief."}, user], TOOLS, format)
    assert merged[0]["content"] == f"Be brief.\n\n{system['content']}"
    assert len(merged) == 2


def test_no_tools_no_change():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "user", "content": "v"}]
    for template in (templates.CHATML, templates.QWEN25, templates.PHI4_MINI):
        assert prompt_messages(messages, [], detect(template)) == (messages, None)


def test_results_stand_with_their_neighbours():
    chat, _ = prompt_messages(HISTORY, [], detect(templates.GEMMA3))
    assert [message["role"] for message in chat] == ["user", "assistant", "user"]
    result = "<tool_response>\n{}\n</tool_response>\n".format
    assert chat[-1]["content"] == result("sun") + result("rain") + "Thanks."


def test_one_call_a_message():
    first = ASSISTANT | {"content": "I'll look."}
    chat, variable = prompt_messages([HISTORY[0], first, *HISTORY[2:]], TOOLS, detect(templates.LLAMA31))
    assert variable == TOOLS
    assert [message["role"] for message in chat] == ["user", "assistant", "tool", "assistant", "tool", "user"]
    assert [message["content"] for message in chat] == ["And in Rome?", "I'll look.", "sun", "", "rain", "Thanks."]
    assert chat[3]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert prompt_messages(HISTORY[2:], TOOLS, detect(templates.LLAMA31))[0][0]["content"] == "sun"  # answers nothing


def test_ids_of_calls_may_come_again_or_not_at_all():
    second = [message | {"content": "snow"} if message["role"] == "tool" else message for message in HISTORY]
    chat, _ = prompt_messages(HISTORY + second, TOOLS, detect(templates.LLAMA31))
    assert [message["content"] for message in chat if message["role"] == "tool"] == ["sun", "rain", "snow", "snow"]
    single = ASSISTANT | {"tool_calls": ASSISTANT["tool_calls"][:1]}
    results = [message | {"tool_call_id": None} for message in HISTORY if message["role"] == "tool"]
    nameless = [single, results[0], single, results[1]]
    chat, _ = prompt_messages(nameless, TOOLS, detect(templates.LLAMA31))
    assert [message["content"] for message in chat] == ["", "sun", "", "rain"]


def test_what_is_not_said_is_left_out():
    (message,), _ = prompt_messages(
        [{"role": "assistant", "content": "x", "name": None, "tool_calls": []}], [], detect(templates.LLAMA31)
    )
    assert message == {"role": "assistant", "content": "x"}


def test_developers_are_systems_where_a_template_does_not_know_them():
    messages = [{"role": "developer", "content": "x"}]
    assert prompt_messages(messages, [], detect(templates.QWEN25))[0][0]["role"] == "system"
    assert prompt_messages(messages, [], detect(templates.GPT_OSS))[0][0]["role"] == "developer"


def test_reasoning():
    said = ASSISTANT | {"reasoning": "Hm."}
    assert prompt_messages([said], [], detect(templates.QWEN3))[0][0]["reasoning_content"] == "Hm."
    assert "analysis<|message|>Hm.<|end|>" in prompt(templates.GPT_OSS, [said])
    assert "functions.get_weather" in prompt(templates.GPT_OSS, [said | {"content": "I'll look."}])


def test_the_users_messages_are_left_alone():
    before = json.dumps(HISTORY)
    for name in ("CHATML", "LLAMA31", "QWEN25", "PHI4_MINI"):
        prompt(getattr(templates, name), HISTORY)
    assert json.dumps(HISTORY) == before


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"'])
@pytest.mark.parametrize("template", [templates.CHATML, templates.QWEN25])
def test_bad_arguments_in_the_history(template, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ValueError, match=r"a call of f has the arguments .* give a JSON object"):
        prompt_messages([{"role": "assistant", "tool_calls": [call]}], [], detect(template))


def test_no_arguments_and_no_description():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat, shown = prompt_messages([{"role": "assistant", "tool_calls": [call]}], tools, detect(templates.QWEN25))
    assert chat[0]["tool_calls"][0]["function"]["arguments"] == {}
    assert list(prompt_messages([], TOOLS, detect(templates.QWEN25))[1][0]["function"]) == list(TOOLS[0]["function"])
    assert shown == [{"type": "function", "function": {"name": "f", "description": ""}}]


def test_images_are_refused():
    with pytest.raises(ValueError, match="type 'image_url'; only text"):
        prompt_messages([{"role": "user", "content": [{"type": "image_url"}]}], [], detect(""))
