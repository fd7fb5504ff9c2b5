"""Text that follows a grammar: which tokens may come next. llguidance knows the grammars, this the tokens."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tokenizer import Tokenizer

WHITESPACE = "[ \\t\\n]{0,16}"  # between the parts of JSON: room to indent it, and none to get lost in
COMPILED = 64  # grammars that are kept for requests to come
# In characters. Some take llguidance a time that grows with their square: 3 s for the worst of this length.
LONGEST = {"json": 1 << 17, "choice": 1 << 16, "regex": 1 << 16, "grammar": 1 << 15}
MOST_CHOICES = 1000  # llguidance takes up to 2000 ways to go on
LONGEST_REASON = 300  # characters of what llguidance says, which may repeat all of a grammar
STACK_BYTES = 256 << 20  # of address space: llguidance goes down a chain of rules with a call for each
_STACK_LOCK = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the text must be; exactly one of these is given. The names are vLLM's.

    json: a JSON schema, as a mapping or as text. json_object: any JSON object. regex: a regular expression in Rust's
    syntax, which the whole text matches. choice: one of these strings. grammar: EBNF, as llama.cpp (GBNF) or Lark
    write it.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise ValueError(f"structured_outputs has {' and '.join(given) or 'nothing'}; give exactly one of {names}")
        if self.choice is not None:
            choices = [] if isinstance(self.choice, str) else list(self.choice)
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                raise ValueError(f"choice is {self.choice!r}; it must be strings that are not empty")
            if len(choices) > MOST_CHOICES:
                raise ValueError(f"choice has {len(choices)} strings; it must have at most {MOST_CHOICES}")
            object.__setattr__(self, "choice", tuple(choices))
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a text")
        if self.json is not None:
            object.__setattr__(self, "json", self._schema(self.json))
        for name, most in LONGEST.items():
            value = getattr(self, name) or ""
            size = len(value) if isinstance(value, str) else sum(map(len, value))
            if size > most:
                raise ValueError(f"{name} has {size} characters; it must have at most {most}")

    @staticmethod
    def _schema(schema: str | Mapping[str, Any]) -> str:
        """As text, so that what it says can't change any more."""
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"json is no JSON schema: {error}") from None
        if not isinstance(parsed, Mapping | bool):
            raise ValueError(f"json is {text[:80]}; it must be a JSON schema, an object")
        return text


class Matcher:
    """One text on its way through a grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allow(self, mask: NDArray[np.int32]) -> None:
        """Write which tokens may come next, in bits: `allowed` of pace.reference.sample, one row."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"the grammar: {_line(self._matcher.get_error())}")

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(f"the grammar: {_line(self._matcher.get_error())}")

    @property
    def complete(self) -> bool:
        """Whether nothing more can follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Compiles grammars for the tokens of one model, of which `end_tokens` end a text."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_tokens: frozenset[int]) -> None:
        self._words = _Words(tokenizer, end_tokens)
        self._vocabulary, self._end_tokens = vocabulary, end_tokens
        self._compiled = lru_cache(COMPILED)(self._compile)

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """At the beginning of a text. ValueError for what is no grammar, with what llguidance says of it."""
        return Matcher(self._compiled(params).deep_copy())

    def _compile(self, params: StructuredOutputsParams) -> Any:
        from llguidance import LLMatcher

        tokenizer = self._tokenizer
        try:
            matcher = _on_deep_stack(lambda: LLMatcher(tokenizer, _grammar(params), log_level=0))
        except ValueError as error:
            raise ValueError(f"structured_outputs can't be followed: {_line(str(error))}") from None
        if matcher.is_error():
            raise ValueError(f"structured_outputs can't be followed: {_line(matcher.get_error())}")
        return matcher

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(self._words), n_vocab=self._vocabulary, eos_token=sorted(self._end_tokens) or None
        )


def _on_deep_stack(work: Callable[[], Any]) -> Any:
    """The result of some work that may call itself often: an overflow would end the process."""
    with _STACK_LOCK:  # the size is that of all threads to come
        before = threading.stack_size(STACK_BYTES)
        try:
            pool = ThreadPoolExecutor(1, "pace-grammar")
            future = pool.submit(work)
        finally:
            threading.stack_size(before)
    with pool:
        return future.result()


def _grammar(params: StructuredOutputsParams) -> str:
    """As llguidance takes it."""
    from llguidance import LLMatcher, grammar_from

    if params.json_object or params.json is not None:
        schema = '{"type": "object"}' if params.json_object else str(params.json)
        return LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": WHITESPACE})
    if params.regex is not None:
        return grammar_from("regex", params.regex)
    if params.choice is not None:
        return grammar_from("choice", json.dumps(params.choice))
    return grammar_from("grammar", str(params.grammar))


def _line(message: str) -> str:
    """What llguidance says, without the state of its parser or its program."""
    line = " ".join(message.partition("<state>")[0].partition("<backtrace>")[0].split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} …"


class _Words:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, end_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(end_tokens, default=0)
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_ids)

    @property
    def tokens(self) -> list[bytes]:
        return [self._tokenizer.piece(token) for token in range(self._tokenizer.vocab_size)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text, add_special_tokens=False)
