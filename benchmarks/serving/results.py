"""What a run found, as a file: to be shown again, and beside others."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .figures import Percentiles, Point


@dataclass(frozen=True)
class Run:
    name: str  # of the server, as the tables and plots call it
    model: str
    settings: Mapping[str, Any]
    points: tuple[Point, ...]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(_plain(asdict(self)), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Run":
        saved = json.loads(path.read_text())
        return cls(**{**saved, "points": tuple(map(_point, saved["points"]))})


def _plain(value: Any) -> Any:
    """Without the numbers that JSON has not: the rate `inf` is a text, what was not measured is null."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _point(saved: Mapping[str, Any]) -> Point:
    named = {field.name: saved[field.name] for field in fields(Point)}
    for field in fields(Point):
        if field.type is Percentiles:
            values = saved[field.name].items()
            named[field.name] = Percentiles(**{key: math.nan if each is None else each for key, each in values})
    return Point(**{**named, "level": float(saved["level"])})
