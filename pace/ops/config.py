"""Which backend each operator runs on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from pace.options import read_config

from . import registry

FILES = ".toml", ".yaml", ".yml", ".json"


def _default() -> str:
    return next(name for name in registry.FALLBACK if registry.missing(name) is None)


@dataclass(frozen=True)
class OperatorConfig:
    """The backend of every operator, by name; "" is NATIVE, or REFERENCE where that can't run.

    ValueError for a name that is no backend's, or of one that can't run here; it lists those that can.
    """

    norm: str = ""
    linear: str = ""
    qkv_projection: str = ""
    rope: str = ""
    attention: str = ""
    out_projection: str = ""
    mlp: str = ""
    activation: str = ""
    softmax: str = ""
    moe: str = ""
    embedding: str = ""
    lm_head: str = ""
    sampling: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            asked = getattr(self, field.name)
            if not isinstance(asked, str):
                raise ValueError(f"{field.name} is {asked!r}; it must be the name of a backend, such as NATIVE")
            backend = asked or _default()
            reason = registry.missing(backend)
            if reason is not None:
                there = ", ".join(registry.available())
                raise ValueError(f"{field.name} asks for backend {backend}, but {reason}; available here: {there}")
            object.__setattr__(self, field.name, backend)

    @classmethod
    def all(cls, backend: str) -> "OperatorConfig":
        """Every operator on one backend."""
        return cls(**{field.name: backend for field in fields(cls)})

    @classmethod
    def parse(cls, value: "str | Mapping[str, str] | OperatorConfig | None") -> "OperatorConfig":
        """A backend's name for all operators, JSON or a mapping of operators to backends, or None for the default; or
        the path of a TOML, YAML or JSON file of these, or with them as its `ops`, as that of a server.
        """
        if isinstance(value, OperatorConfig):
            return value
        if value is None or value == "":
            return cls()
        if isinstance(value, str) and value.endswith(FILES):
            values = read_config(value)
            chosen = values.get("ops", values)
            if not isinstance(chosen, Mapping | str) or (isinstance(chosen, str) and chosen.endswith(FILES)):
                raise ValueError(
                    f"ops in {value} is {chosen!r}; it must be a backend, or operators with a backend each"
                )
            return cls.parse(chosen)
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            return cls.all(value)
        try:
            chosen = json.loads(value) if isinstance(value, str) else dict(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'operators is not JSON ({error}); it must be like {{"norm": "NATIVE"}}') from None
        known = [field.name for field in fields(cls)]
        for name in chosen:
            if name not in known:
                raise ValueError(f"operator {name!r} is unknown; there are {', '.join(known)}")
        return cls(**chosen)

    @classmethod
    def tuned(cls, model: str | Path, dtype: str = "auto") -> "OperatorConfig":
        """The fastest backend of each operator for a model, here: measured once, then known (pace.tuning). model and
        dtype: as for LLM.
        """
        tuning = import_module("pace.tuning")  # which runs models, and they are above this
        tuned: OperatorConfig = tuning.tuned(model, dtype)
        return tuned

    def resolve(self, operator: str, dtype: registry.Dtype, in_panels: bool = False) -> SimpleNamespace:
        """The functions of an operator, by name. in_panels: for a weight that stays in panels."""
        return registry.resolve(operator, getattr(self, operator), dtype, in_panels)
