"""Options from a file."""

from pathlib import Path
from typing import Any


def read_config(path: str) -> dict[str, Any]:
    """The options in a TOML file, or a YAML one, which JSON is as well. ValueError for what is neither."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".toml"):
            import tomllib

            return tomllib.loads(text)
        if path.endswith(".json"):
            import json

            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text) or {}
    except ModuleNotFoundError:
        raise ValueError(f"{path} can't be read: YAML needs pyyaml, of the extra `serve`; or write TOML") from None
    except Exception as error:  # each library has its own
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options: write lines such as `port: 8000`")
    return values
