"""How families of models write their thinking and their tool calls, and which family a chat template belongs to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from pace.engine.chat_template import variables
from pace.engine.tokenizer import Tokenizer

from .tool_calls import Take, take_deepseek, take_harmony, take_json

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How tool calls are written: between an opening and a closing tag, or up to the end where there is no closing one.

    form: one call, with $name and $arguments. bare: a text that begins with a brace is a call without its tag.
    one_a_message: a template takes no more calls in one message. A tool's result, where the template has no place for
    it, is a message of result_role.
    """

    name: str
    opening: tuple[str, ...]
    closing: tuple[str, ...]
    take: Take
    form: str
    bare: bool = False
    one_a_message: bool = False
    result_role: str = "user"
    result: str = "<tool_response>\n$content\n</tool_response>"


@dataclass(frozen=True)
class Thinking:
    name: str
    opening: str
    closing: tuple[str, ...]


HERMES = Calls(
    name="hermes",
    opening=("<tool_call>",),
    closing=("</tool_call>",),
    take=take_json,
    form='<tool_call>\n{"name": "$name", "arguments": $arguments}\n</tool_call>',
)
LLAMA3_JSON = Calls(
    name="llama3_json",
    opening=("<|python_tag|>",),
    closing=(),
    take=take_json,
    form='{"name": "$name", "parameters": $arguments}',
    bare=True,
    one_a_message=True,
)
PHI4_MINI = Calls(
    name="phi4_mini",
    opening=("<|tool_call|>", "functools["),
    closing=("<|/tool_call|>",),
    take=take_json,
    form='<|tool_call|>[{"name": "$name", "arguments": $arguments}]<|/tool_call|>',
    result_role="tool_response",  # the template makes a tag of any role, and the model knows this one
    result="$content",
)
DEEPSEEK = Calls(
    name="deepseek",
    opening=("<｜tool▁calls▁begin｜>",),
    closing=("<｜tool▁calls▁end｜>",),
    take=take_deepseek,
    form="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>$name\n"
    "```json\n$arguments\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
HARMONY = Calls(
    name="harmony",
    opening=(),  # a message's header says what it is
    closing=("<|end|>", "<|call|>", "<|return|>"),
    take=take_harmony,
    form="<|channel|>commentary to=functions.$name <|constrain|>json<|message|>$arguments<|call|>",
    one_a_message=True,
)
THINK = Thinking("think", "<think>", ("</think>",))
ANALYSIS = Thinking("harmony", "<|channel|>analysis", HARMONY.closing)

CALLS = {calls.name: calls for calls in (HERMES, LLAMA3_JSON, PHI4_MINI, DEEPSEEK, HARMONY)}
THINKING: dict[str, Thinking | None] = {
    "think": THINK,
    "deepseek_r1": THINK,
    "qwen3": THINK,
    "harmony": ANALYSIS,
    "none": None,
}


@dataclass(frozen=True)
class Format:
    """tools_go: where a template takes tools from: its variable `tools`, that field of the system message ("field"), or
    nowhere ("text"): then the system message's text describes them.
    """

    calls: Calls = HERMES
    thinking: Thinking | None = None
    tools_go: Literal["variable", "field", "text"] = "text"

    @property
    def in_channels(self) -> bool:
        """Whether a reply is several messages, each with a header."""
        return self.calls is HARMONY

    def keeps_special_tokens(self, tools: bool) -> bool:
        """Whether the text must have its special tokens to be understood: many models' tags of calls are such tokens.
        tools: whether the request offers any.
        """
        return self.in_channels or tools

    def begun_by(self, prompt: str) -> str:
        """The end of a prompt that belongs to the reply: some templates open the thinking themselves."""
        if self.in_channels:
            _, start, header = prompt.rpartition("<|start|>assistant")
            return header if start else ""
        opening = self.thinking.opening if self.thinking else ""
        return opening if prompt.rstrip().endswith(opening) else ""


def format_of(tokenizer: Tokenizer) -> Format:
    """The format of a model's chats."""
    if tokenizer.needs_harmony:
        return Format(HARMONY, ANALYSIS, "variable")
    templates = tokenizer.chat_templates
    return detect(templates.get("tool_use") or templates.get("default", ""))


def detect(chat_template: str) -> Format:
    """The format that a template's source shows; for one that knows no tools, the generic one."""
    if "<|channel|>" in chat_template:
        calls = HARMONY
    elif DEEPSEEK.opening[0] in chat_template:
        calls = DEEPSEEK
    elif "<|tool|>" in chat_template or PHI4_MINI.opening[0] in chat_template or "functools[" in chat_template:
        calls = PHI4_MINI
    elif "<|python_tag|>" in chat_template or "<|start_header_id|>ipython" in chat_template:
        calls = LLAMA3_JSON
    else:
        calls = HERMES
    thinks = THINK if "</think>" in chat_template else None
    return Format(calls, ANALYSIS if calls is HARMONY else thinks, _tools_go(chat_template))


def _tools_go(chat_template: str) -> Literal["variable", "field", "text"]:
    if "tools" in variables(chat_template):
        return "variable"
    return "field" if re.search(r"\[['\"]tools['\"]\]", chat_template) else "text"


def override(format: Format, tool_parser: str | None = None, reasoning_parser: str | None = None) -> Format:
    """What a user names instead of what was detected."""
    calls = format.calls if tool_parser is None else _named(CALLS, tool_parser, "tool parser")
    thinking = format.thinking if reasoning_parser is None else _named(THINKING, reasoning_parser, "reasoning parser")
    if thinking is not None and (thinking is ANALYSIS) != (calls is HARMONY):
        raise ValueError(
            f"the reasoning parser {thinking.name} can't be used with the tool parser {calls.name}: "
            "name harmony for both, or none as the reasoning parser"
        )
    return replace(format, calls=calls, thinking=thinking)


def _named(registry: Mapping[str, T], name: str, what: str) -> T:
    if name not in registry:
        raise ValueError(f"there is no {what} {name!r}; use one of {', '.join(registry)}")
    return registry[name]
