"""`pace serve`, whose options are the fields of ServerConfig."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, replace
from typing import Annotated, Any

import typer

from pace.options import read_config
from pace.server.config import ServerConfig, kind_of

from .sizes import as_bytes


def serve(**options: Any) -> None:
    """Answer over HTTP, as OpenAI's API does.

    An option is taken from the command line, or else from the --config file. PACE_API_KEY adds a key.
    """
    try:
        import yaml

        from pace.server.front import serve as run
    except ModuleNotFoundError as error:
        raise ImportError(f"pace serve needs {error.name}: pip install 'pace[serve]'") from None
    try:
        config = _config(options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if options["print_config"]:
        print(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True), end="")
    else:
        run(config)


def _config(options: Mapping[str, Any]) -> ServerConfig:
    values = read_config(options["config"]) if options["config"] else {}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    given = {name: value for name, value in options.items() if name not in ("config", "print_config")}
    config = ServerConfig.of(values | {name: value for name, value in given.items() if value not in (None, [])})
    key = os.environ.get("PACE_API_KEY")
    return replace(config, api_key=(*config.api_key, key)) if key else config


def _option(each: "Field[Any]") -> inspect.Parameter:
    """None is what was not said."""
    flag = "--" + each.name.replace("_", "-")
    default = each.default if each.default is not MISSING else ()
    shown = "" if default in (None, (), False) else f" [dim]\\[default: {default}][/]"
    settings: dict[str, Any] = {"help": each.metadata["help"] + shown, "rich_help_panel": each.metadata["panel"]}
    settings["show_default"] = False
    kind: Any = kind_of(each) if kind_of(each) is not tuple else list[str]
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    if each.metadata["kind"] == "bytes":
        settings |= {"parser": as_bytes, "metavar": "SIZE"}
    annotation = Annotated[kind | None, typer.Option(flag, **settings)]
    return inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameters() -> list[inspect.Parameter]:
    model = Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="As for `pace generate`; may stand in the --config file.", show_default=False
        ),
    ]
    config = Annotated[str | None, typer.Option("--config", metavar="FILE", help="Options, in YAML or TOML.")]
    show = Annotated[bool, typer.Option("--print-config", help="Print what all of it comes to, without keys, and end.")]
    keyword, default = inspect.Parameter.KEYWORD_ONLY, {"model": None, "config": None, "print_config": False}
    first = [
        inspect.Parameter(name, keyword, default=default[name], annotation=annotation)
        for name, annotation in (("model", model), ("config", config), ("print_config", show))
    ]
    return first + [_option(each) for each in fields(ServerConfig) if each.name != "model"]


serve.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
serve.__annotations__ = {each.name: each.annotation for each in _parameters()}
