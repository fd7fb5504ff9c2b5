"""What models are built of, and differ in only a few lines of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pace.cache import KVCache, Placement
from pace.errors import ModelError
from pace.ops import Linear, RoPE
from pace.reference.arrays import Array, Float

# What each kind of rotary scaling is told.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class SelfAttention:
    """Fused QKV projection, rotary positions, the cache, the output projection."""

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        rope: RoPE,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        *,
        window: int | None = None,
        sinks: Float | None = None,
        softcap: float | None = None,
    ) -> None:
        """scale, window, sinks and softcap are those of pace.reference.attend."""
        self.qkv, self.out, self.rope = qkv, out, rope
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.window, self.sinks, self.softcap = scale, window, sinks, softcap

    def __call__(self, x: Array, layer: int, placement: Placement, cache: KVCache) -> Array:
        tokens = len(x)
        qkv = self.qkv(x).reshape(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = np.split(qkv, (self.heads, self.heads + self.kv_heads), axis=1)
        self.rope(q, k, placement.positions)
        attended = cache.attend(layer, q, k, v, placement, self.scale, self.window, self.sinks, self.softcap)
        return self.out(attended.reshape(tokens, -1))


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding as a configuration gives it: transformers 5's `rope_parameters`, or `rope_theta` beside
    `rope_scaling` before that.
    """

    kind: str
    theta: float
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "RopeParameters":
        settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = settings.get("rope_type") or settings.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise ModelError(f"rope_type is {kind!r}; this model is supported with {', '.join(ROPE_TYPES)}")
        partial = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
        if partial != 1:
            raise ModelError(f"partial_rotary_factor in config.json is {partial!r}; this model is supported with 1")
        for key in ROPE_TYPES[kind]:
            if not isinstance(settings.get(key), int | float):
                raise ModelError(
                    f"rope_parameters in config.json has {key} {settings.get(key)!r}; rope_type {kind} needs a number"
                )
        return cls(kind, float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0), settings)

    def frequencies(self, rotary_dim: int) -> Float:
        """Radians a position, of each pair: θ^(-2i/d) (Su et al., 2021), scaled as `kind` says; (rotary_dim / 2,)."""
        exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
        frequencies: Float = (1 / np.float32(self.theta) ** exponents).astype(np.float32)
        match self.kind:
            case "linear":
                frequencies /= np.float32(self.settings["factor"])
            case "llama3":
                return self._llama3(frequencies)
        return frequencies

    def _llama3(self, frequencies: Float) -> Float:
        """Long wavelengths are divided by `factor`, short ones kept, those between blended (Llama 3.1, section 3.4)."""
        factor, original = self.settings["factor"], self.settings["original_max_position_embeddings"]
        low, high = self.settings["low_freq_factor"], self.settings["high_freq_factor"]
        turns = np.float32(original) / (np.float32(2 * math.pi) / frequencies)  # within the original context
        keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
        blended: Float = (1 - keep) * frequencies / np.float32(factor) + keep * frequencies
        return blended.astype(np.float32)
