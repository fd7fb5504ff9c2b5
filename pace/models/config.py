"""A model's configuration: the values of config.json, each read with its type."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pace.errors import ModelError

# The names of activations in Hugging Face configurations, and of ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Config:
    """Each reader raises ModelError for a value of another type, or for one that is missing and has no default."""

    values: Mapping[str, Any]

    @property
    def text(self) -> "Config":
        """Of the language model, where it is a part."""
        return Config(self.values.get("text_config") or self.values)

    def renamed(self, names: Mapping[str, str]) -> "Config":
        """With what stands under other names under the usual ones too: {other: usual}."""
        return Config({**self.values, **{usual: self.values.get(other) for other, usual in names.items()}})

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer, positive unless `least` says otherwise."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            wanted = "a positive integer" if least == 1 else f"an integer of {least} or more"
            raise ModelError(f"{key} in config.json is {value!r}; it must be {wanted}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelError(f"{key} in config.json is {value!r}; it must be a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{key} in config.json is {value!r}; it must be true or false")
        return value

    def activation(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if value not in ACTIVATIONS:
            raise ModelError(f"{key} in config.json is {value!r}; supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def heads(self, hidden: int) -> tuple[int, int, int]:
        """num_attention_heads, num_key_value_heads and head_dim, which fit each other."""
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(
                f"num_key_value_heads in config.json is {kv_heads}; it must divide num_attention_heads {heads}"
            )
        head_dim = self.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise ModelError(f"head_dim in config.json is {head_dim}; it must be even")
        return heads, kv_heads, head_dim

    def windows(self, window: int | None, slides: Callable[[int], bool]) -> list[int | None]:
        """How far each layer sees (None: to the beginning): as `layer_types` says, else `window` where it `slides`."""
        count = self.integer("num_hidden_layers")
        kinds = self.values.get("layer_types")
        if kinds is None:
            return [window if slides(index) else None for index in range(count)]
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= set(known):
            raise ModelError(f"layer_types in config.json is {kinds!r}; it must name one of {known} for {count} layers")
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"config.json has no {key}")
        return default
