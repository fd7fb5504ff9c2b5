"""Rotary positions as configurations ask for them: every kind of scaling, in one place.

The formulas are those of the papers named below, as transformers computes them (float32 throughout): its
`rope_parameters`, or `rope_theta` beside `rope_scaling` before version 5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pace.errors import ModelError
from pace.ops import Frequencies
from pace.reference.arrays import Float

from .config import Config

# What each kind must be told; in a text's length `dynamic` and `longrope` follow it.
KINDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
NAMES = {"su": "longrope"}  # as the first Phi-3 had it


@dataclass(frozen=True)
class Rotary:
    """What config.json says of rotary positions, for `rotary_dim` elements of each head."""

    kind: str
    theta: float
    rotary_dim: int
    max_positions: int
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, config: Config, head_dim: int, settings: Mapping[str, Any] | None = None) -> "Rotary":
        """settings: those of one type of layers, where each type has its own. ModelError for what can't be."""
        settings = _settings(config) if settings is None else settings
        kind = _kind(settings)
        if kind not in KINDS:
            raise ModelError(f"rope_type is {kind!r}; supported are {', '.join(KINDS)}")
        max_positions = config.integer("max_position_embeddings")
        original = config.values.get("original_max_position_embeddings")  # where Phi-3 has it
        settings = {"original_max_position_embeddings": original or max_positions, **_given(settings)}
        rotary_dim = config.integer("rotary_dim", int(head_dim * _fraction(settings, config)))
        if rotary_dim > head_dim or rotary_dim % 2:
            raise ModelError(
                f"config.json has {rotary_dim} of {head_dim} elements of a head rotated (rotary_dim, or "
                "partial_rotary_factor of head_dim); it must be an even number of them"
            )
        for key in KINDS[kind]:
            _check(key, settings.get(key), kind, rotary_dim // 2)
        theta = settings.get("rope_theta") or config.values.get("rope_theta") or 10000.0
        return cls(kind, float(theta), rotary_dim, max_positions, settings)

    def frequencies(self) -> Frequencies:
        """Of texts as long as those that the model was trained on, and of longer ones where the kind tells them
        apart.
        """
        match self.kind:
            case "linear":
                return Frequencies(self._plain() / np.float32(self.settings["factor"]))
            case "dynamic":
                return Frequencies(self._plain(), trained=self.max_positions, stretched=self._dynamic)
            case "llama3":
                return Frequencies(self._llama3(self._plain()))
            case "yarn":
                return Frequencies(self._yarn(self._plain()), self._yarn_scale())
            case "longrope":
                short, long = (self._longrope(self.settings[f"{which}_factor"]) for which in ("short", "long"))
                return Frequencies(short, self._longrope_scale(), self._original, lambda _: long, uniform=True)
        return Frequencies(self._plain())

    @property
    def _original(self) -> int:
        return int(self.settings["original_max_position_embeddings"])

    def _plain(self, theta: float | None = None) -> Float:
        """Radians a position, of each pair: θ^(-2i/d) (Su et al., 2021); (rotary_dim / 2,)."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        frequencies: Float = (1 / np.float32(theta or self.theta) ** exponents).astype(np.float32)
        return frequencies

    def _dynamic(self, length: int) -> Float:
        """θ grows with the text (the NTK scaling of bloc97 and emozilla, 2023)."""
        factor, dim = self.settings["factor"], self.rotary_dim
        stretch = factor * length / self.max_positions - (factor - 1)
        return self._plain(self.theta * float(stretch ** (dim / (dim - 2))))

    def _llama3(self, frequencies: Float) -> Float:
        """Long wavelengths are divided by `factor`, short ones kept, those between blended (Llama 3.1, section 3.4)."""
        factor = self.settings["factor"]
        low, high = self.settings["low_freq_factor"], self.settings["high_freq_factor"]
        turns = np.float32(self._original) / (np.float32(2 * math.pi) / frequencies)  # within the original context
        keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
        return _blend(frequencies, factor, keep)

    def _yarn(self, frequencies: Float) -> Float:
        """Pairs that turn often are kept, those that turn seldom are divided by `factor` (Peng et al., 2023)."""
        fast, slow = (self.settings.get(f"beta_{which}") or default for which, default in (("fast", 32), ("slow", 1)))
        dim = self.rotary_dim

        def pair_turning(turns: float) -> float:
            return dim * math.log(self._original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = pair_turning(fast), pair_turning(slow)
        if self.settings.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(max(last - first, 0.001))
        return _blend(frequencies, self.settings["factor"], 1 - np.clip(ramp, 0, 1))

    def _yarn_scale(self) -> float:
        factor, mscale, all_dim = (self.settings.get(key) for key in ("factor", "mscale", "mscale_all_dim"))
        if (given := self.settings.get("attention_factor")) is not None:
            return float(given)

        def scale(weight: float) -> float:
            return 1.0 if factor is None or factor <= 1 else 0.1 * weight * math.log(factor) + 1

        return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1)

    def _longrope(self, factors: list[float]) -> Float:
        """Each pair is slowed by a factor of its own (Ding et al., 2024)."""
        return (self._plain() / np.array(factors, np.float32)).astype(np.float32)

    def _longrope_scale(self) -> float:
        """Of cosines and sines."""
        if (given := self.settings.get("attention_factor")) is not None:
            return float(given)
        factor = self.settings.get("factor") or self.max_positions / self._original
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self._original))


def longest_text(config: Config) -> int:
    """In tokens: `max_position_embeddings`, or with dynamic scaling `factor` times as many."""
    positions, settings = config.integer("max_position_embeddings"), _settings(config)
    return int(positions * settings["factor"]) if _kind(settings) == "dynamic" and "factor" in settings else positions


def _settings(config: Config) -> dict[str, Any]:
    return {**(config.values.get("rope_scaling") or {}), **(config.values.get("rope_parameters") or {})}


def _kind(settings: Mapping[str, Any]) -> str:
    kind = settings.get("rope_type") or settings.get("type") or "default"
    return NAMES.get(kind, kind)


def _blend(frequencies: Float, factor: float, keep: Float) -> Float:
    blended: Float = (1 - keep) * frequencies / np.float32(factor) + keep * frequencies
    return blended.astype(np.float32)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _fraction(settings: Mapping[str, Any], config: Config) -> float:
    """The part of each head that is rotated."""
    value = settings.get("partial_rotary_factor") or config.values.get("partial_rotary_factor") or 1.0
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise ModelError(f"partial_rotary_factor in config.json is {value!r}; it must be a number in (0, 1]")
    return float(value)


def _check(key: str, value: Any, kind: str, pairs: int) -> None:
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, list) or len(value) != pairs or not all(isinstance(x, int | float) for x in value):
            raise ModelError(f"rope_parameters in config.json has {key} {value!r}; {kind} needs {pairs} numbers")
    elif not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"rope_parameters in config.json has {key} {value!r}; rope_type {kind} needs a number above 0")
