"""Prompt lookup (Saxena, 2023): a text goes on as it did where its last tokens stood before. No model."""

from collections.abc import Sequence
from typing import ClassVar

from pace.cache import KVCache
from pace.models import Model

from .base import Draft, Proposer, SpeculativeConfig, Text


class NGram(Proposer):
    """Looks for the last `longest` tokens, then for fewer, down to `shortest`; of several places the latest counts."""

    OPTIONS: ClassVar = {"longest": 4, "shortest": 2}

    def __init__(
        self, config: SpeculativeConfig, target: Model, draft: Draft | None = None, cache: KVCache | None = None
    ) -> None:
        self._longest, self._shortest = int(config.option("longest")), int(config.option("shortest"))
        if self._longest < self._shortest:
            raise ValueError(
                f"longest of speculative is {self._longest}; it must be at least {self._shortest}, as shortest is"
            )
        self._indices: dict[Text, _Index] = {}

    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        return [self._index_of(text).continuation(text.ids, count) for text, count in zip(texts, counts, strict=True)]

    def forget(self, text: Text) -> None:
        self._indices.pop(text, None)

    def _index_of(self, text: Text) -> "_Index":
        if text not in self._indices:
            self._indices[text] = _Index(range(self._shortest, self._longest + 1))
        return self._indices[text]


class _Index:
    """Where each run of tokens was last followed by another: a text is never read twice."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._follows: list[dict[tuple[int, ...], int]] = [{} for _ in sizes]  # run of each size → place of the next
        self._read = 0  # places whose runs before them are known

    def continuation(self, ids: list[int], count: int) -> list[int]:
        self._extend(ids)
        for size, follows in zip(reversed(self._sizes), reversed(self._follows), strict=True):
            if len(ids) >= size and (place := follows.get(tuple(ids[-size:]))) is not None:
                period = len(ids) - place  # what repeats itself goes on to
                return [ids[place + i % period] for i in range(count)]
        return []

    def _extend(self, ids: list[int]) -> None:
        for size, follows in zip(self._sizes, self._follows, strict=True):
            first, end = max(self._read, size), len(ids)
            if first < end:
                runs = zip(*(ids[first - size + i : end - size + i] for i in range(size)), strict=True)
                follows.update(zip(runs, range(first, end), strict=True))
        self._read = len(ids)
