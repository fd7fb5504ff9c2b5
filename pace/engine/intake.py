"""What users ask for, made into requests that the engine can take: checked, encoded, or refused with the numbers."""

from bisect import bisect_right
from collections import abc
from functools import partial
from itertools import count
from numbers import Integral
from operator import index
from typing import Any

import numpy as np

from pace.cache import KVCache
from pace.errors import ModelError
from pace.models import Model

from .images import NO_IMAGES, Message, PlacedImage, Source, expanded, place, read, taken
from .keys import Stretch
from .pooling import Pool, PoolingParams
from .request import Request
from .sampling_params import SamplingParams, as_token_ids, model_defaults
from .sequence import Sequence
from .stopping import TextStream
from .structured import Grammars, Matcher
from .tokenizer import Detokenizer, Tokenizer

# A text, token ids, or {"prompt": either, "images": […]}.
Prompt = str | abc.Sequence[int] | abc.Mapping[str, Any]


class Intake:
    """Safe to use from several threads."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        tokenizer: Tokenizer,
        generation_config: abc.Mapping[str, Any],
        max_batch_tokens: int | None = None,
    ) -> None:
        """max_batch_tokens: of a prompt, in one step. ModelError for a generation_config whose values can't be."""
        try:
            self.defaults = model_defaults(generation_config)
        except ValueError as error:
            raise ModelError(f"generation_config.json: {error}") from None
        self.vocabulary, self.max_positions, self.bytes_per_token = (
            model.vocabulary,
            model.max_positions,
            model.cache_shape.bytes_per_token,
        )
        named = as_token_ids(generation_config.get("eos_token_id")) or tokenizer.eos_token_ids
        self.end_tokens = frozenset(token for token in named if 0 <= token < model.vocabulary)
        self._tokenizer, self._images = tokenizer, model.images
        beyond = model.stretched_beyond
        self._stretch = None if beyond is None else Stretch(beyond, model.stretched_whole)
        self._capacity = cache.stats().capacity_tokens
        chunk = max_batch_tokens
        if chunk is not None and model.images is not None:
            chunk = max(chunk, model.images.tokens_per_image)  # an image goes through whole
        self._tokens_needed = partial(cache.tokens_needed, chunk=chunk)
        lengths = range(self.max_positions + 1)
        self._longest = bisect_right(lengths, self._capacity, key=self._tokens_needed) - 1  # that the cache holds
        self._grammars = Grammars(tokenizer, model.vocabulary, self.end_tokens)
        self._ids = count()

    def request(
        self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0, request_id: str | None = None
    ) -> Request:
        """A request, which Engine.add takes.

        ValueError for a prompt that is empty, has tokens which the model lacks, or does not fit the context or the
        cache with what is asked for; and for parameters that this model can't follow.
        """
        params = (params or SamplingParams()).with_defaults(self.defaults)
        tokens, images = self._read(prompt)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.vocabulary:
                raise ValueError(f"{name} is {getattr(params, name)}; the vocabulary has {self.vocabulary} tokens")
        max_tokens, ends = self._room(len(tokens), params.max_tokens), self._ends(params)
        bias, bad_words = self._bias(params)

        def sequence(number: int) -> Sequence:
            detokenizer = Detokenizer(self._tokenizer, params.skip_special_tokens, follows_text=True)
            stream = TextStream(detokenizer, params.stop, params.include_stop_str_in_output)
            matcher = self._matcher(params)
            return Sequence(
                number, tokens, params, max_tokens, ends, stream, bias, bad_words, matcher, images, self._stretch
            )

        sequences = [sequence(number) for number in range(params.num_texts)]
        return self._request(prompt, sequences, priority, request_id)

    def embedding(
        self, prompt: Prompt, params: PoolingParams | None = None, priority: int = 0, request_id: str | None = None
    ) -> Request:
        """A request for the embedding of a prompt, which Engine.add takes.

        ValueError as for `request`, but the prompt may take all of the context.
        """
        if not isinstance(params, PoolingParams | None):
            raise ValueError(f"pooling_params is {params!r}; it must be PoolingParams, or None")
        (tokens, images), unused = self._read(prompt), SamplingParams().with_defaults({})
        stream, room = TextStream(Detokenizer(self._tokenizer), (), include_stop=False), self._room(len(tokens), 0)
        sequence = Sequence(0, tokens, unused, room, frozenset(), stream, {}, images=images, stretch=self._stretch)
        return self._request(prompt, [sequence], priority, request_id, Pool(params or PoolingParams()))

    def _request(
        self,
        prompt: Prompt,
        sequences: list[Sequence],
        priority: int,
        request_id: str | None,
        pool: Pool | None = None,
    ) -> Request:
        if not isinstance(priority, Integral):
            raise ValueError(f"priority is {priority!r}; it must be an integer")
        text = prompt["prompt"] if isinstance(prompt, abc.Mapping) else prompt
        return Request(
            id=str(next(self._ids)) if request_id is None else request_id,
            prompt=text if isinstance(text, str) else None,
            prompt_token_ids=sequences[0].ids[:],
            params=sequences[0].params,
            sequences=sequences,
            priority=int(priority),
            pool=pool,
        )

    def chat(self, messages: abc.Sequence[Message], **template: Any) -> Prompt:
        """The prompt of a chat, whose content may have images; what else is named goes to the template.

        ValueError for images that can't be read, or that the model does not take.
        """
        plain, sources = taken(messages)
        if not sources:
            return self._tokenizer.chat(plain, **template)
        if self._images is None:
            raise ValueError(NO_IMAGES)
        text = expanded(self._tokenizer.chat_text(plain, **template), len(sources), self._images)
        images = [read(source, self._images) for source in sources]
        return {"prompt": self._tokenizer.encode(text, add_special_tokens=False), "images": images}

    def _read(self, prompt: Prompt) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """A prompt's tokens, of which there are some, and the images among them."""
        text, sources = _parted(prompt) if isinstance(prompt, abc.Mapping) else (prompt, [])
        if sources and self._images is None:
            raise ValueError(NO_IMAGES)
        if self._images is not None and isinstance(text, str):
            text = expanded(text, len(sources), self._images)
        tokens = self.token_ids(self._tokenizer.encode(text) if isinstance(text, str) else text, "the prompt")
        if not tokens:
            raise ValueError("the prompt is empty: give at least one token")
        if self._images is None:
            return tokens, ()
        return tokens, place(tokens, [read(source, self._images) for source in sources], self._images)

    def token_ids(self, tokens: abc.Iterable[int], where: str) -> list[int]:
        """Of a list, also of NumPy's integers, or of a NumPy array or a torch tensor. ValueError for ids that the
        model does not have.
        """
        listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        ids = [_as_id(token) for token in listed]
        for token, value in zip(ids, listed, strict=True):
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"token {value} of {where} is outside the vocabulary of {self.vocabulary}")
        return ids

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a text: what the user says of them wins over the model."""
        own = self.end_tokens
        if params.eos_token_ids is not None:
            own = frozenset(self.token_ids(params.eos_token_ids, "eos_token_ids"))
        stop = frozenset(self.token_ids(params.stop_token_ids, "stop_token_ids"))
        return stop if params.ignore_eos else stop | own

    def _bias(self, params: SamplingParams) -> tuple[dict[int, float], list[tuple[int, ...]]]:
        """What is added to logits for good, and the words of several tokens that are not said."""
        bias = dict(params.logit_bias or {})
        self.token_ids(bias, "logit_bias")
        words = [tuple(word) for text in params.bad_words for word in self._spellings(text)]
        bias |= {word[0]: -np.inf for word in words if len(word) == 1}
        return bias, [word for word in words if len(word) > 1]

    def _spellings(self, word: str) -> list[list[int]]:
        """The tokens of a word at the beginning of a text, and in the middle of one, where a space comes before it."""
        bare = word.strip()
        return [
            tokens for text in (bare, " " + bare) if (tokens := self._tokenizer.encode(text, add_special_tokens=False))
        ]

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        return None if params.structured_outputs is None else self._grammars.matcher(params.structured_outputs)

    def _room(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many tokens of output there can be: as asked for, but within the model's context. 0 for embeddings."""
        positions, capacity = self.max_positions, self._capacity
        if prompt_tokens + (max_tokens != 0) > positions:
            raise ValueError(f"the prompt has {prompt_tokens} tokens; the model's context is {positions}: shorten it")
        wanted = min(positions if max_tokens is None else max_tokens, positions - prompt_tokens)
        least = prompt_tokens + (wanted if max_tokens is not None else 1)
        if self._tokens_needed(least) > capacity:
            needed = self._tokens_needed(least) * self.bytes_per_token
            raise ValueError(
                f"{least} tokens do not fit the cache's {capacity}: give kv_cache_bytes of {needed} or more"
            )
        return min(wanted, self._longest - prompt_tokens)


def _parted(prompt: abc.Mapping[str, Any]) -> tuple[str | abc.Sequence[int], abc.Sequence[Source]]:
    if prompt.keys() != {"prompt", "images"} or not isinstance(prompt["images"], list | tuple):
        raise ValueError(f'a prompt has {sorted(prompt)}; it must be {{"prompt": …, "images": [ … ]}}')
    return prompt["prompt"], prompt["images"]


def _as_id(token: int) -> int:
    try:
        return index(token)
    except TypeError:
        return -1  # nobody's
