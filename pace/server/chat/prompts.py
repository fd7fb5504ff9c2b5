"""A chat's messages as a model's template can take them, with the tools that the request offers."""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from string import Template
from typing import Any

from .formats import Calls, Format

Message = dict[str, Any]
Tool = Mapping[str, Any]

_TOOLS = Template("""\
# Tools

You may call functions where they help to answer. These are the functions, each with a JSON schema of its arguments:
<tools>
$tools
</tools>

To call one, write its name and a JSON object of its arguments in exactly this form, once for each call:
$form""")


def prompt_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], format: Format
) -> tuple[list[Message], list[Tool] | None]:
    """What to give to the template: messages, and `tools` where it knows that variable. In the others, calls and
    results become text, and so do the tools. ValueError where the history has arguments that are no JSON object.
    """
    chat = [_plain(message, format) for message in messages]
    if format.tools_go == "variable":
        if format.calls.one_a_message:
            chat = _one_call_a_message(chat)
        return [_with_objects(message) for message in chat], [_described(tool) for tool in tools] or None
    chat = _as_text(chat, format.calls)
    return (_with_tools(chat, tools, format) if tools else chat), None


def _plain(message: Mapping[str, Any], format: Format) -> Message:
    """Without what is not said, and the content as one text: templates ask for no more, unless there are images."""
    plain = {key: value for key, value in message.items() if value is not None and (key != "tool_calls" or value)}
    plain["content"] = content = _content(message.get("content")) or plain.pop("refusal", "")
    if plain["role"] == "developer" and not format.in_channels:
        plain["role"] = "system"
    if reasoning := plain.pop("reasoning", None) or plain.get("reasoning_content"):
        plain["reasoning_content"] = reasoning
        if format.in_channels and not content:  # its template takes one of the two
            plain["thinking"] = reasoning
    return plain


def _content(content: Any) -> Any:
    if isinstance(content, list) and any(part["type"] == "image" for part in content):
        return [part if part["type"] == "image" else {"type": "text", "text": text_of([part])} for part in content]
    return text_of(content)


def text_of(content: Any) -> str:
    """A message's content, which may come in parts. ValueError for a part that is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") not in ("text", "refusal"):
            raise ValueError(f"a message has a part of type {part.get('type')!r}; only text is understood")
    return "\n".join(part[part["type"]] for part in content)


def _with_objects(message: Message) -> Message:
    """Templates write arguments as JSON themselves."""
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _arguments(call["function"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _described(tool: Tool) -> Tool:
    """Some templates write the description unasked."""
    function = tool["function"]
    return {**tool, "function": {**function, "description": function.get("description") or ""}}


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    given = function.get("arguments") or {}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"a call of {function['name']} has the arguments {given!r}; give a JSON object, as text")
    return arguments


def _one_call_a_message(chat: Sequence[Message]) -> list[Message]:
    """Each call in a message of its own, its result behind it: of those that come next, since ids may come again."""
    parted, left = list[Message](), list(chat)
    while left:
        message = left.pop(0)
        if len(calls := message.get("tool_calls", [])) < 2:
            parted.append(message)
            continue
        results = list(takewhile(lambda each: each["role"] == "tool", left))
        del left[: len(results)]
        for call in calls:
            parted.append(message | {"tool_calls": [call]})
            message = {"role": "assistant", "content": ""}  # what else was said is said once
            mine = (i for i, each in enumerate(results) if each.get("tool_call_id") == call.get("id"))
            if (found := next(mine, None)) is not None:
                parted.append(results.pop(found))
        parted += results
    return parted


def _as_text(chat: Sequence[Message], calls: Calls) -> list[Message]:
    """Calls as the model writes them, and results as messages; in one with their neighbours where a template wants
    roles that take turns.
    """
    written: list[Message] = []
    before = ""
    for message in chat:
        role, text = message["role"], message["content"]
        if role == "tool":
            message = {"role": calls.result_role, "content": Template(calls.result).substitute(content=text)}
        elif "tool_calls" in message:
            called = [_call(call["function"], calls) for call in message["tool_calls"]]
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["content"] = "\n".join([text, *called] if text else called)
        if "tool" in (before, role) and written and written[-1]["role"] == message["role"]:
            written[-1] = written[-1] | {"content": _joined(written[-1]["content"], message["content"])}
        else:
            written.append(message)
        before = role
    return written


def _joined(before: Any, behind: Any) -> Any:
    """Two contents, as text where both are."""
    if isinstance(before, str) and isinstance(behind, str):
        return f"{before}\n{behind}"
    first, second = ([{"type": "text", "text": each}] if isinstance(each, str) else each for each in (before, behind))
    return first + second


def _call(function: Mapping[str, Any], calls: Calls) -> str:
    arguments = json.dumps(_arguments(function), ensure_ascii=False)
    return Template(calls.form).substitute(name=function["name"], arguments=arguments)


def _with_tools(chat: Sequence[Message], tools: Sequence[Tool], format: Format) -> list[Message]:
    has_system = bool(chat) and chat[0]["role"] == "system"
    system, others = (chat[0], chat[1:]) if has_system else ({"role": "system", "content": ""}, chat)
    functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    if format.tools_go == "field":
        return [system | {"tools": f"[{', '.join(functions)}]"}, *others]
    form = Template(format.calls.form).substitute(name="NAME", arguments='{"ARGUMENT": VALUE, …}')
    described = _TOOLS.substitute(tools="\n".join(functions), form=form)
    return [system | {"content": "\n\n".join(filter(None, [system["content"], described]))}, *others]
