"""How one request is sampled and when it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from pace.reference.sample import SAMPLING_DTYPE

_MOST = 1e6  # well within float32, which the kernel computes in
_INTEGERS = ("top_k", "seed", "max_tokens", "min_tokens", "logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_OPTIONAL = ("seed", "max_tokens", "logprobs")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it ends; names and defaults are those that vLLM's users know.

    temperature 0 takes the most probable token. top_k 0 or -1, top_p 1, min_p 0 and typical_p 1 are off, as are a
    repetition_penalty of 1 and a frequency_penalty and presence_penalty of 0; pace.reference.sample has the formulas
    and their order. The same seed gives the same tokens, whatever else is in the batch; None draws one.

    max_tokens None goes on to the end of the context. Before min_tokens no token that ends the text is drawn. The text
    ends before the first of the `stop` strings, an end-of-text token (unless ignore_eos) or one of stop_token_ids; with
    include_stop_str_in_output after it.

    logprobs n gives, for every token, the log-probabilities of the n most probable tokens and of the token itself, of
    the unmodified distribution; 0 of the token alone.

    ValueError for a value of another type or out of its range, with the range. NumPy's numbers are numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            self._convert(name, Integral, int, "an integer")
        for name in _NUMBERS:
            self._convert(name, Real, float, "a number")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", self._items("stop", stop, str, str, "strings that are not empty"))
        tokens = self._items("stop_token_ids", self.stop_token_ids, Integral, int, "token ids")
        object.__setattr__(self, "stop_token_ids", tokens)
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature <= _MOST, f"from 0 to {_MOST}"),
            ("top_k", -1 <= self.top_k < 2**31, "a count, or 0 or -1 for none"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 1 / _MOST <= self.repetition_penalty <= _MOST, f"from {1 / _MOST} to {_MOST}"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or math.inf), "from 0 to max_tokens"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("seed", self.seed is None or self.seed >= 0, "at least 0, or None"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0, or None"),
        ):
            value = getattr(self, name)
            if not fits or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}; it must be {wanted}")

    def _convert(self, name: str, kind: type, to: type, wanted: str) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}{', or None' if name in _OPTIONAL else ''}")
        object.__setattr__(self, name, to(value))

    def _items(self, name: str, values: Any, kind: type, to: type, wanted: str) -> tuple[Any, ...]:
        try:
            items = tuple(values)
        except TypeError:
            items = (None,)
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
            raise ValueError(f"{name} is {values!r}; it must be {wanted}")
        return tuple(to(item) for item in items)

    @property
    def penalises(self) -> bool:
        """Whether any penalty is on, so that what was said has to be counted."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    def row(self) -> np.ndarray:
        """The numbers that the kernel `sample` takes, (1,) SAMPLING_DTYPE."""
        return np.array([tuple(getattr(self, name) for name in SAMPLING_DTYPE.names or ())], SAMPLING_DTYPE)
