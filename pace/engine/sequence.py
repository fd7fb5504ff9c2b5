"""The tokens of one text: the prompt's, then the output's, with all that drawing the next one needs."""

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pace.reference.arrays import Array

from .images import PlacedImage
from .keys import Stretch
from .sampling_params import SamplingParams
from .stopping import TextStream
from .structured import Matcher

if TYPE_CHECKING:
    from .request import Logprobs, Request


class Seen:
    """What the penalties look at: each id of a prompt and an output once, and how often it is in the output."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.fromiter(self._places, np.int32, len(self._places))
        self._counts = np.zeros(len(self._places), np.int32)

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids, self._counts = (np.pad(array, (0, place + 64)) for array in (self._ids, self._counts))
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int32]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int32]:
        return self._counts[: len(self._places)]


class Sequence:
    """`computed` of `ids` have their keys and values in the cache, as its sequence `slot`, known by `keys`.

    Between steps a sequence that runs has at least one token that is not computed: its last. An image's tokens are
    computed together or not at all.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        max_tokens: int,
        end_tokens: frozenset[int],
        stream: TextStream,
        bias: Mapping[int, float],
        bad_words: Iterable[tuple[int, ...]] = (),
        matcher: Matcher | None = None,
        images: tuple[PlacedImage, ...] = (),
        stretch: Stretch | None = None,
    ) -> None:
        """bias: what is added to logits, for good. bad_words: tokens of which the last is not said after the others.
        images: in the order of the prompt. stretch: what the model does to long texts.
        """
        self.index, self.params, self.max_tokens, self.end_tokens = index, params, max_tokens, end_tokens
        self.request: Request
        self.ids, self.num_prompt = prompt[:], len(prompt)
        self.stream, self.bad_words, self.matcher = stream, tuple(bad_words), matcher
        self._bias, self._bias_arrays = bias, _arrays(bias)
        self.row = params.row()
        self._generator = np.random.Generator(np.random.Philox(_seeds(params.seed, index)))
        self._uniforms: list[float] = []  # drawn ahead of their tokens
        self.seen = Seen(prompt) if params.penalises else None
        self.images, self.stretch = images, stretch
        self.first_length = len(prompt)  # of the text, when its first token went through the model
        self.keys = self._keys() if images or stretch is not None else self.ids
        self.encoded: tuple[PlacedImage, Array] | None = None  # an image that is not computed, and its rows
        self.computed = 0
        self.slot: int | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def origin(self) -> "Sequence":
        """The first text of its request."""
        return self.request.sequences[0]

    @property
    def pending(self) -> int:
        """Tokens that have not been through the model."""
        return len(self.ids) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether it goes on with one token, which is no image's."""
        return len(self.ids) - self.computed == 1 and not (self.images and self.next_image)

    @property
    def next_image(self) -> PlacedImage | None:
        """The first that is not computed."""
        return next((image for image in self.images if image.begin >= self.computed), None)

    def piece(self, most: int) -> int:
        """How many tokens go through the model next, if there is room for so many: up to the next image that is not
        encoded. Where the room ends within an image, the tokens before it, or else all of it.
        """
        end = min(self.computed + most, len(self.ids))
        for image in self.images:
            if self.computed <= image.begin < end:
                encoded = self.encoded is not None and self.encoded[0] is image
                if encoded and (image.end <= end or image.begin == self.computed):
                    end = max(end, image.end)
                else:
                    end = image.begin
        return end - self.computed

    def whole(self, length: int) -> int:
        """The most tokens up to `length` that cut no image."""
        return next((image.begin for image in self.images if image.begin < length < image.end), length)

    @property
    def outgrown(self) -> bool:
        """Whether all of it must be computed anew, because it has grown so long."""
        return (
            self.stretch is not None and self.stretch.whole and self.first_length <= self.stretch.beyond < len(self.ids)
        )

    def begin_anew(self) -> None:
        """As a text of the length that it has now."""
        self.first_length = len(self.ids)
        self.keys = self._keys()

    def _keys(self) -> list[int]:
        keys = self.ids[:]
        for image in self.images:
            keys[image.begin : image.end] = image.keys
        return self._stretched(keys, 0)

    def keys_behind(self, tokens: Iterable[int]) -> list[int]:
        """What the cache would know these by, if they came next."""
        return self._stretched(list(tokens), len(self.keys))

    def _stretched(self, keys: list[int], begin: int) -> list[int]:
        """Of the tokens from `begin` on."""
        if self.stretch is None:
            return keys
        return [self.stretch.key(key, max(self.first_length, at)) for at, key in enumerate(keys, begin + 1)]

    @property
    def most_tokens(self) -> int:
        """All tokens that it can come to hold in the cache."""
        return self.num_prompt + self.max_tokens

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first."""
        assert self.request.arrival is not None
        return self.request.priority, self.request.arrival, self.index

    @property
    def mean_logprob(self) -> float:
        return self.cumulative_logprob / max(len(self.token_ids), 1)

    def bias(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Token ids, each once, and what is added to their logits now. -inf bans what would end a text too early, or a
        word that is not to be said.
        """
        early = len(self.token_ids) < self.params.min_tokens
        banned = [*self.end_tokens] if early else []
        banned += [word[-1] for word in self.bad_words if self._ends_with(word[:-1])]
        return _arrays({**self._bias, **dict.fromkeys(banned, -np.inf)}) if banned else self._bias_arrays

    def _ends_with(self, tokens: tuple[int, ...]) -> bool:
        return tuple(self.ids[len(self.ids) - len(tokens) :]) == tokens

    def uniforms(self, count: int) -> list[float]:
        """What the next tokens are drawn with: the same until they are there, also where a step is interrupted."""
        if self.params.temperature == 0:
            return [0.0] * count
        while len(self._uniforms) < count:
            self._uniforms.append(self._generator.random())
        return self._uniforms[:count]

    def accept(self, token: int) -> None:
        """One more token of output, which may be the last."""
        del self._uniforms[:1]
        if self.request.metrics.first_token is None:
            self.request.metrics.first_token = time.perf_counter()
        self.ids.append(token)
        if self.keys is not self.ids:
            self.keys += self.keys_behind([token])
        self.token_ids.append(token)
        if self.seen is not None:
            self.seen.add(token)
        ends = token in self.end_tokens
        if not ends or self.params.include_stop_str_in_output:
            self.stream.push(token)
        if self.matcher is not None and not ends:
            self.matcher.accept(token)
        if ends:
            self.finish("stop", token)
        elif self.stream.stopped_by is not None:
            self.finish("stop", self.stream.stopped_by)
        elif self.matcher is not None and self.matcher.complete:
            self.finish("stop", None)
        elif len(self.token_ids) >= self.max_tokens:
            self.finish("length", None)

    def finish(self, reason: str, detail: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, detail  # first: whatever the text does, it is over
        if self.request.finished:
            self.request.metrics.finished = time.perf_counter()
        self.stream.finish()
        if self.stream.stopped_by is not None and reason == "length":
            self.finish_reason, self.stop_reason = "stop", self.stream.stopped_by


def _seeds(seed: int | None, index: int) -> Any:
    """The first text of a request is that of its seed alone; the others have streams of their own."""
    return seed if index == 0 or seed is None else np.random.SeedSequence(seed, spawn_key=(index,))


def _arrays(bias: Mapping[int, float]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    return np.fromiter(bias, np.int32, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
