"""The tools that a request offers, and what its tool_choice makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pace.engine.structured import StructuredOutputsParams

from .tool_calls import NAME

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolUse:
    """shown: what the prompt shows and the reply may call. grammar: what a reply follows that must be calls; it is read
    by `Parser.of_forced_calls`.
    """

    shown: tuple[Mapping[str, Any], ...] = ()
    grammar: StructuredOutputsParams | None = None


def tool_use(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool = True,
) -> ToolUse:
    """The three as OpenAI has them. ValueError for tools or a choice that are none."""
    functions = _functions(tools or ())
    shown = tuple(tools or ())
    if tool_choice == "none":
        return ToolUse()
    if tool_choice in (None, "auto"):
        return ToolUse(shown)
    if tool_choice == "required":
        if not functions:
            raise ValueError("tool_choice is 'required', and there are no tools; give tools, or leave it out")
        return ToolUse(shown, _grammar(functions, several=parallel_tool_calls))
    name = _chosen(tool_choice)
    if name not in functions:
        raise ValueError(f"tool_choice names {name!r}, which is not among the tools: {', '.join(functions) or 'none'}")
    return ToolUse(shown, _grammar({name: functions[name]}, several=False))


def _chosen(tool_choice: Any) -> str:
    try:
        if tool_choice["type"] == "function":
            return str(tool_choice["function"]["name"])
    except (KeyError, TypeError):
        pass
    raise ValueError(
        f"tool_choice is {tool_choice!r}; it must be 'none', 'auto', 'required', "
        "or {'type': 'function', 'function': {'name': …}}"
    )


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The schema of each function's arguments, by name."""
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        name, parameters = _function(tool)
        if name in functions:
            raise ValueError(f"two tools are called {name!r}; give each its own name")
        functions[name] = parameters
    return functions


def _function(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    kind, function = tool.get("type"), tool.get("function")
    if kind != "function" or not isinstance(function, Mapping):
        raise ValueError(f"a tool has the type {kind!r}; it must be 'function', with a `function` that is an object")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"a tool is called {name!r}; a name is 1 to 64 of a-z, A-Z, 0-9, _ and -")
    if parameters is None:
        return name, _NO_ARGUMENTS
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ValueError(f"the parameters of {name} are {parameters!r}; they must be a JSON schema of type 'object'")
    return name, {"type": "object", **parameters}


def _grammar(functions: Mapping[str, Mapping[str, Any]], several: bool) -> StructuredOutputsParams:
    """A list of calls, each with arguments after its function's own schema, whose references stay its own."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in functions
    ]
    schema = {
        "type": "array",
        "items": {"anyOf": calls},
        "minItems": 1,
        "$defs": {name: _moved(parameters, f"#/$defs/{name}") for name, parameters in functions.items()},
    }
    return StructuredOutputsParams(json=schema if several else schema | {"maxItems": 1})


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at `place` in another: its references begin there."""
    if isinstance(schema, Mapping):
        return {
            key: place + value.removeprefix("#") if _is_reference(key, value) else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(each, place) for each in schema] if isinstance(schema, list) else schema


def _is_reference(key: str, value: Any) -> bool:
    return key == "$ref" and isinstance(value, str) and value.startswith("#")
