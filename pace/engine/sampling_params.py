"""How one request is sampled and when it ends."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from operator import index
from typing import Any, Self

import numpy as np

from pace.reference.sample import SAMPLING_DTYPE

from .structured import StructuredOutputsParams

_MOST = 1e6  # well within float32, which the kernel computes in
_INTEGERS = ("top_k", "seed", "max_tokens", "min_tokens", "n", "best_of", "logprobs", "prompt_logprobs")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
_OPTIONAL = ("seed", "max_tokens", "best_of", "logprobs", "prompt_logprobs")
# What a model may have its own value of, in its generation_config.json, and the value where it has none.
NEUTRAL: Mapping[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it ends; names and defaults are those that vLLM's users know.

    temperature, top_k, top_p, min_p, typical_p and repetition_penalty are the model's own where they are None: those of
    its generation_config.json, or else 1, 0, 1, 0, 1 and 1. temperature 0 takes the most probable token; top_k 0 or -1,
    top_p 1, min_p 0, typical_p 1 and a repetition_penalty of 1 are off, as are a frequency_penalty and presence_penalty
    of 0. logit_bias {token: value} is added to logits, bad_words are not said; structured_outputs is what the text has
    to be. pace.reference.sample has the formulas and their order.

    The same seed gives the same tokens, whatever else is in the batch; None draws one. n texts are written, of which
    the first is what n = 1 gives; of best_of, the n with the highest log-probability a token.

    max_tokens None goes on to the end of the context. Before min_tokens no token that ends the text is drawn. The text
    ends before the first of the `stop` strings, one of eos_token_ids (None: the model's own; none with ignore_eos) or
    of stop_token_ids; with include_stop_str_in_output after it.

    logprobs n gives, for every token, the log-probabilities of the n most probable tokens and of the token itself, of
    the unmodified distribution; 0 of the token alone. prompt_logprobs is the same for the tokens of the prompt.

    ValueError for a value of another type or out of its range, with the range. NumPy's numbers are numbers.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    structured_outputs: StructuredOutputsParams | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    eos_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            self._convert(name, Integral, int, "an integer")
        for name in _NUMBERS:
            self._convert(name, Real, float, "a number")
        for name in ("stop", "bad_words", "stop_token_ids"):
            if getattr(self, name) is None:  # as vLLM's users say that there are none
                self._set(name, ())
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            self._set(name, self._items(name, (value,) if isinstance(value, str) else value, str, str, "strings"))
        for name in ("stop_token_ids", "eos_token_ids"):
            if (tokens := getattr(self, name)) is not None:
                self._set(name, self._items(name, tokens, Integral, int, "token ids"))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        self._set("logit_bias", self._biases())
        for name, fits, wanted in (
            ("temperature", self._within("temperature", 0, _MOST), f"from 0 to {_MOST}"),
            ("top_k", self._within("top_k", -1, 2**31 - 1), "a count, or 0 or -1 for none"),
            ("top_p", self.top_p != 0 and self._within("top_p", 0, 1), "above 0 and at most 1"),
            ("min_p", self._within("min_p", 0, 1), "from 0 to 1"),
            ("typical_p", self.typical_p != 0 and self._within("typical_p", 0, 1), "above 0 and at most 1"),
            (
                "repetition_penalty",
                self._within("repetition_penalty", 1 / _MOST, _MOST),
                f"from {1 / _MOST} to {_MOST}",
            ),
            ("frequency_penalty", self._within("frequency_penalty", -2, 2), "from -2 to 2"),
            ("presence_penalty", self._within("presence_penalty", -2, 2), "from -2 to 2"),
            ("max_tokens", self._within("max_tokens", 1, math.inf), "at least 1, or None"),
            ("min_tokens", self._within("min_tokens", 0, self.max_tokens or math.inf), "from 0 to max_tokens"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("bad_words", all(word.strip() for word in self.bad_words), "strings that are not blank"),
            ("seed", self._within("seed", 0, math.inf), "at least 0, or None"),
            ("n", self._within("n", 1, math.inf), "at least 1"),
            ("best_of", self._within("best_of", self.n, math.inf), f"at least n, which is {self.n}, or None"),
            ("logprobs", self._within("logprobs", 0, math.inf), "at least 0, or None"),
            ("prompt_logprobs", self._within("prompt_logprobs", 0, math.inf), "at least 0, or None"),
            (
                "structured_outputs",
                isinstance(self.structured_outputs, StructuredOutputsParams | None),
                "StructuredOutputsParams, or None",
            ),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _within(self, name: str, least: float, most: float) -> bool:
        """Whether a number is in its range; it is where it is left to the model, or to nobody."""
        value = getattr(self, name)
        return value is None or least <= value <= most

    def _convert(self, name: str, kind: type, to: type, wanted: str) -> None:
        value = getattr(self, name)
        optional = name in _OPTIONAL or name in NEUTRAL
        if value is None and optional:
            return
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}{', or None' if optional else ''}")
        try:
            self._set(name, to(value))
        except OverflowError:
            raise ValueError(f"{name} is {value!r}; it must be {wanted} that a float can hold") from None

    def _items(self, name: str, values: Any, kind: type, to: type, wanted: str) -> tuple[Any, ...]:
        try:
            items = tuple(values)
        except TypeError:
            items = (None,)
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
            raise ValueError(f"{name} is {values!r}; it must be {wanted}")
        return tuple(to(item) for item in items)

    def _biases(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        try:
            biases = {index(token): float(value) for token, value in dict(self.logit_bias).items()}
        except (TypeError, ValueError, OverflowError):
            biases = {0: math.nan}
        if not all(-_MOST <= value <= _MOST for value in biases.values()):
            raise ValueError(
                f"logit_bias is {self.logit_bias!r}; it must be token ids with numbers from {-_MOST} to {_MOST}"
            )
        return biases

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """With a value for all that was left to the model: of `defaults`, or the neutral one."""
        left = [name for name in NEUTRAL if getattr(self, name) is None]
        return replace(self, **{name: defaults.get(name, NEUTRAL[name]) for name in left}) if left else self

    @property
    def num_texts(self) -> int:
        """How many are written, to choose from."""
        return self.best_of or self.n

    @property
    def chooses(self) -> bool:
        """Whether some of the texts are left out in the end."""
        return self.num_texts > self.n

    @property
    def penalises(self) -> bool:
        """Whether any penalty is on, so that what was said has to be counted."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    def row(self) -> bytes:
        """The numbers that the kernel `sample` takes, one SAMPLING_DTYPE; of params with defaults."""
        return np.array([tuple(getattr(self, name) for name in SAMPLING_DTYPE.names or ())], SAMPLING_DTYPE).tobytes()


def model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a model's generation_config.json has for NEUTRAL's names. ValueError for one that can't be."""
    named = {name: generation_config[name] for name in NEUTRAL if generation_config.get(name) is not None}
    SamplingParams(**named)
    return named


def as_token_ids(value: int | Iterable[int] | None) -> frozenset[int]:
    """The ids of a configuration's eos_token_id, which is one, a list, or nothing."""
    return frozenset(() if value is None else [value] if isinstance(value, int) else value)
