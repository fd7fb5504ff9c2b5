"""A model's configuration: the values of config.json, each read with its type."""

from collections.abc import Mapping
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

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{key} in config.json is {value!r}; it must be a positive integer")
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

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"config.json has no {key}")
        return default
