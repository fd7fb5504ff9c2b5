"""The protocol of every proposer: from texts to drafts, guesses at the tokens that come next.

A draft changes how fast a text is written, never what is written: the engine draws every token itself, and a draft that
it does not draw is dropped.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Protocol, Self

from pace.cache import CACHES, KVCache
from pace.models import Model
from pace.ops import OperatorConfig


class Text(Protocol):
    """What a proposer knows of a text that is being written. It only ever becomes longer."""

    @property
    def ids(self) -> list[int]:
        """All tokens that there are, the prompt's first."""

    @property
    def origin(self) -> "Text":
        """The first text of the same request: until one of them ends, prompts are alike."""

    @property
    def row(self) -> bytes:
        """How tokens are drawn, one element of SAMPLING_DTYPE."""

    def uniforms(self, count: int) -> list[float]:
        """What the next `count` tokens are drawn with, in [0, 1); nothing is used up."""


@dataclass(frozen=True)
class Draft:
    """A draft model as it is loaded, which the engines of several processes share."""

    model: Model
    config: Mapping[str, Any]  # its config.json
    operators: OperatorConfig


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How drafts are made.

    method: a name in pace.speculative.PROPOSERS. model, dtype, cache: of the draft model, where the method has one; no
    cache is the target's.
    num_tokens: drafts at a time, at most. adaptive: fewer, or none, where they do not pay; else always as many.
    options: what else the method knows.
    """

    method: str
    model: str | None = None
    dtype: str = "auto"
    cache: str | None = None
    num_tokens: int = 12
    adaptive: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: "str | Mapping[str, Any] | SpeculativeConfig | None") -> Self | None:
        """From JSON or a mapping, in which options stand beside the rest. ValueError for what can't be."""
        if given is None or isinstance(given, cls):
            return given
        try:
            values = json.loads(given) if isinstance(given, str) else given
        except ValueError:
            values = None
        if not isinstance(values, Mapping):
            raise ValueError(f'speculative is {given!r}; it must be such as {{"method": "ngram", "num_tokens": 8}}')
        own = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        if "method" not in own:
            raise ValueError(f"speculative is {dict(values)!r}; it must name a method")
        more = {name: value for name, value in values.items() if name not in own}
        return cls(**own | {"options": {**own.get("options", {}), **more}})

    def __post_init__(self) -> None:
        from . import PROPOSERS

        if self.method not in PROPOSERS:
            raise ValueError(f"method of speculative is {self.method!r}; it must be {', '.join(sorted(PROPOSERS))}")
        if not isinstance(self.num_tokens, int) or isinstance(self.num_tokens, bool) or self.num_tokens < 1:
            raise ValueError(f"num_tokens of speculative is {self.num_tokens!r}; it must be an integer, at least 1")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive of speculative is {self.adaptive!r}; it must be true or false")
        proposer = PROPOSERS[self.method]
        if (isinstance(self.model, str) and bool(self.model)) != proposer.NEEDS_MODEL:
            wanted = "needs the name of one" if proposer.NEEDS_MODEL else "has none"
            raise ValueError(f"model of speculative is {self.model!r}; the method {self.method} {wanted}")
        if self.cache is not None and self.cache not in CACHES:
            raise ValueError(f"cache of speculative is {self.cache!r}; it must be {', '.join(CACHES)}")
        for name, value in self.options.items():
            if name not in proposer.OPTIONS:
                known = ", ".join([*self.__dataclass_fields__, *proposer.OPTIONS])
                raise ValueError(f"{name} is no option of speculative {self.method}; they are {known}")
            if not isinstance(value, Real) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} of speculative is {value!r}; it must be a number above 0")

    def option(self, name: str) -> Any:
        from . import PROPOSERS

        return self.options.get(name, PROPOSERS[self.method].OPTIONS[name])


class Proposer(ABC):
    """Of one engine, and used by its thread alone.

    A text is known from when it is first named to `forget`, and may be named again after that, whatever has become of
    it. What proposes wrongly, too much or too little costs time only: drafts past `counts` and tokens that the target
    lacks are dropped. One that raises is not asked again.
    """

    NEEDS_MODEL: ClassVar[bool] = False
    OPTIONS: ClassVar[Mapping[str, Any]] = {}  # numbers above 0 that the method can be given, and what they are else

    @abstractmethod
    def __init__(
        self, config: SpeculativeConfig, target: Model, draft: Draft | None = None, cache: KVCache | None = None
    ) -> None:
        """draft and cache: where the method has a model, that and a cache for its keys and values."""

    @abstractmethod
    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        """The next tokens of each text, counts[i] ≥ 1 of texts[i] or fewer."""

    def unread(self, text: Text) -> int:
        """Tokens that have to be read before drafts are cheap; 0 where there are few. `propose` reads them else."""
        return 0

    def read(self, texts: Sequence[Text], most: int) -> None:  # noqa: B027 - many have nothing to read
        """Up to `most` such tokens, those of the first texts first."""

    def forget(self, text: Text) -> None:  # noqa: B027
        """A text has ended, or waits without keys and values."""
