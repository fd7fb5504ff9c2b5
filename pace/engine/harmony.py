"""Chats as GPT-OSS reads them, where its checkpoint comes without a chat template: written by OpenAI's own library.

The distribution `oss-harmony` (it imports as openai_harmony) has its vocabulary with it and needs no network.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

SPECIAL_TOKENS = ("<|start|>", "<|channel|>", "<|message|>")  # that a vocabulary has if its model speaks harmony


def render(
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str = "medium",
    model_identity: str | None = None,
    **others: Any,
) -> str:
    """The text of a chat: OpenAI's roles, `tool_calls`, and an assistant's thinking as `reasoning_content` or
    `thinking`. ValueError for what can't be written so; ImportError without the library. `others` are what other
    templates know.
    """
    harmony = _library()
    try:
        effort = harmony.ReasoningEffort[reasoning_effort.upper()]
    except KeyError:
        known = ", ".join(name.lower() for name in harmony.ReasoningEffort.__members__)
        raise ValueError(f"reasoning_effort is {reasoning_effort!r}; it must be {known}") from None
    system = harmony.SystemContent.new().with_reasoning_effort(effort)
    system = system.with_conversation_start_date(datetime.now().strftime("%Y-%m-%d"))
    if model_identity is not None:
        system = system.with_model_identity(model_identity)
    chat = list(messages)
    instructions = chat.pop(0)["content"] if chat and chat[0]["role"] in ("system", "developer") else None
    written = [harmony.Message.from_role_and_content(harmony.Role.SYSTEM, system)]
    if instructions or tools:
        developer = harmony.DeveloperContent.new()
        if instructions:
            developer = developer.with_instructions(instructions)
        if tools:
            developer = developer.with_function_tools([_described(harmony, tool["function"]) for tool in tools])
        written.append(harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, developer))
    calls: dict[str, str] = {}  # id → name
    for message in chat:
        written += _written(harmony, message, calls)
    conversation, encoding = harmony.Conversation.from_messages(written), _encoding()
    if add_generation_prompt:
        tokens = encoding.render_conversation_for_completion(conversation, harmony.Role.ASSISTANT)
    else:
        tokens = encoding.render_conversation(conversation)
    return str(encoding.decode_utf8(tokens))


def _written(harmony: Any, message: Mapping[str, Any], calls: dict[str, str]) -> list[Any]:
    """The messages that one of OpenAI's API becomes."""
    role, content = message["role"], message.get("content") or ""
    if role == "tool":
        name = calls.get(message.get("tool_call_id", ""), message.get("name", "unknown"))
        author = harmony.Author.new(harmony.Role.TOOL, f"functions.{name}")
        result = harmony.Message.from_author_and_content(author, content)
        return [result.with_recipient("assistant").with_channel("commentary")]
    if role != "assistant":
        return [harmony.Message.from_role_and_content(harmony.Role(role), content)]

    def said(text: str, channel: str) -> Any:
        return harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, text).with_channel(channel)

    thinking = message.get("thinking") or message.get("reasoning_content")
    written = [said(thinking, "analysis")] if thinking else []
    called = message.get("tool_calls") or []
    if content:
        written.append(said(content, "commentary" if called else "final"))
    for call in called:
        function = call["function"]
        calls[call.get("id", "")] = function["name"]
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        to = said(text, "commentary").with_recipient(f"functions.{function['name']}")
        written.append(to.with_content_type("<|constrain|>json"))
    return written


def _described(harmony: Any, function: Mapping[str, Any]) -> Any:
    return harmony.ToolDescription.new(
        function["name"], function.get("description") or "", parameters=function.get("parameters")
    )


def _library() -> Any:
    try:
        import openai_harmony
    except ModuleNotFoundError:
        raise ImportError(
            "this model has no chat template, and writing its chats needs oss-harmony: pip install 'pace[harmony]'"
        ) from None
    return openai_harmony


@cache
def _encoding() -> Any:
    harmony = _library()
    return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
