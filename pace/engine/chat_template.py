"""A model's own chat template: Jinja, sandboxed, because a template comes with the model and is not trusted.

The names that a template may use are those of transformers' apply_chat_template, whose import would take a second.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """{% generation %} marks what the model wrote, for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
)
_environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
_environment.filters["tojson"] = _tojson


def compile_template(source: str) -> Template:
    """ValueError where it is not Jinja."""
    try:
        return _environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"the model's chat template is not valid Jinja: {error}") from None


@lru_cache  # a server asks for each chat, and to parse a template takes tens of milliseconds
def variables(source: str) -> frozenset[str]:
    """The names that a template takes from its context. ValueError where it is not Jinja."""
    try:
        return frozenset(meta.find_undeclared_variables(_environment.parse(source)))
    except TemplateError as error:
        raise ValueError(f"the model's chat template is not valid Jinja: {error}") from None


def render(template: Template, **context: Any) -> str:
    """The text of a chat. ValueError where the template refuses it, with the template's own words."""
    plain = json.loads(json.dumps(context))  # a template sees data, never the objects of the program
    try:
        return template.render(**plain)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the model's chat template refuses these messages: {error}") from None
