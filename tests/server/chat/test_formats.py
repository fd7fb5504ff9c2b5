"""Which family a template belongs to."""

import pytest

from pace.engine.chat_template import variables
from pace.server.chat.formats import CALLS, THINKING, Format, detect, override

from . import templates


@pytest.mark.parametrize(
    ("template", "calls", "thinking", "tools_go"),
    [
        ("", "hermes", None, "text"),
        (templates.CHATML, "hermes", None, "text"),
        (templates.GEMMA3, "hermes", None, "text"),
        (templates.QWEN25, "hermes", None, "variable"),
        (templates.QWEN3, "hermes", "think", "variable"),
        (templates.LLAMA31.replace("ipython", "<|python_tag|>"), "llama3_json", None, "variable"),
        (templates.LLAMA31, "llama3_json", None, "variable"),
        (templates.PHI4_MINI, "phi4_mini", None, "field"),
        (templates.R1_DISTILL, "deepseek", "think", "text"),
        (templates.GPT_OSS, "harmony", "harmony", "variable"),
    ],
)
def test_detect(template, calls, thinking, tools_go):
    format = detect(template)
    assert format.calls.name == calls
    assert (format.thinking and format.thinking.name) == thinking
    assert format.tools_go == tools_go


def test_a_template_that_is_none():
    with pytest.raises(ValueError, match="not valid Jinja"):
        detect("{% if %}")


def test_override():
    format = detect(templates.QWEN3)
    assert override(format) == format
    assert override(format, "llama3_json").calls is CALLS["llama3_json"]
    assert override(format, "llama3_json").thinking is format.thinking
    assert override(format, reasoning_parser="none").thinking is None
    assert override(Format(), reasoning_parser="deepseek_r1").thinking is THINKING["think"]
    assert override(Format(), "harmony", "harmony").in_channels
    assert override(detect(templates.GPT_OSS), reasoning_parser="none").in_channels


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("pythonic", None), "no tool parser 'pythonic'; use one of hermes, "),
        ((None, "r1"), "no reasoning parser 'r1'; use one of think, "),
        (("harmony", "qwen3"), "think can't be used with the tool parser harmony"),
        ((None, "harmony"), "harmony can't be used with the tool parser hermes"),
    ],
)
def test_bad_overrides(names, message):
    with pytest.raises(ValueError, match=message):
        override(Format(), *names)


def test_special_tokens_stay_where_they_are_tags():
    assert detect(templates.GPT_OSS).keeps_special_tokens(tools=False)
    assert detect(templates.LLAMA31).keeps_special_tokens(tools=True)
    assert not detect(templates.LLAMA31).keeps_special_tokens(tools=False)


def test_a_template_is_read_once():
    """Each chat asks for what it knows."""
    assert variables(templates.QWEN3) is variables(templates.QWEN3)
    assert "enable_thinking" in variables(templates.QWEN3)
