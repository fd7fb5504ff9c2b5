"""`LLM`: a model, its tokenizer, a cache and the engine, for use from Python."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from numbers import Number
from operator import index
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pace import host
from pace.cache import CACHES, check_block_tokens
from pace.engine.engine import Engine
from pace.engine.request import Request, RequestOutput
from pace.engine.sampling_params import SamplingParams
from pace.engine.stopping import TextStream
from pace.engine.tokenizer import Detokenizer, Tokenizer
from pace.models import load_model, open_checkpoint
from pace.models.hub import resolve
from pace.ops import OperatorConfig

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

MEMORY_SHARE = 4  # the cache takes one part in four of the memory that is free once the weights are loaded


class LLM:
    """A language model on this machine.

    model: a Hugging Face directory, a GGUF file, a name of `pace pull`, or a repository of the Hugging Face hub. dtype:
    "bfloat16", "float32" or "auto", the checkpoint's own (bfloat16 for quantised ones). kv_cache_bytes: the memory for
    keys and values, None for a quarter of what is free. cache: SLAB_POOL, PAGED, BMC or DYNAMIC; block_tokens: its
    blocks, or the steps by which it grows, a multiple of 16, None for its own choice. operators: the backend of each
    operator (see OperatorConfig), by name, mapping or JSON.

    ModelError (a ValueError) for a model that is not there or not whole; ValueError for arguments that can't be. Not
    for use from several threads at once.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str = "auto",
        kv_cache_bytes: int | None = None,
        cache: str = "SLAB_POOL",
        block_tokens: int | None = None,
        operators: str | Mapping[str, str] | OperatorConfig | None = None,
        progress: bool = False,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"cache is {cache!r}; it must be {', '.join(CACHES)}")
        if block_tokens is not None:
            check_block_tokens(block_tokens)
        config = OperatorConfig.parse(operators)
        path = resolve(str(model))
        with open_checkpoint(path) as checkpoint:
            self.tokenizer = Tokenizer.load(path)  # before the weights: what is wrong with it is said at once
            self.model = load_model(checkpoint, dtype, config, progress)
            end_tokens = checkpoint.generation_config.get("eos_token_id") or checkpoint.config.get("eos_token_id")
        named = _as_tokens(end_tokens) or self.tokenizer.eos_token_ids
        self.end_tokens = frozenset(token for token in named if 0 <= token < self.model.vocabulary)
        capacity = kv_cache_bytes if kv_cache_bytes is not None else self._default_cache_bytes()
        self.cache = CACHES[cache](self.model.cache_shape, capacity, config, block_tokens)
        self.engine = Engine(self.model, self.cache, self.tokenizer, operators=config)
        self._ids = count()

    def _default_cache_bytes(self) -> int:
        available = host.describe().memory_available_bytes or 4 << 30
        return max(available // MEMORY_SHARE, 64 << 20)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete each prompt, a text or its token ids; results in the order of the prompts.

        All prompts go through the model together. Each may have its own SamplingParams, or all share one.
        ValueError for a prompt that is empty, that has tokens which the model lacks, or that does not fit the model's
        context or the cache; then none of them runs.
        """
        listed = _as_prompts(prompts)
        requests = [self._request(p, s) for p, s in zip(listed, _as_params(sampling_params, len(listed)), strict=True)]
        try:
            self._run(requests, use_tqdm)
        finally:  # of an interrupted call nothing is left behind
            for request in requests:
                self.engine.cancel(request)
        return [request.output() for request in requests]

    def _run(self, requests: Sequence[Request], use_tqdm: bool) -> None:
        for request in requests:
            self.engine.add(request)
        running = set(requests)
        with tqdm(total=len(requests), unit="prompt", disable=not use_tqdm) as bar:
            while running:
                ended = {request for request in self.engine.step() if request.finish_reason is not None} & running
                running -= ended
                bar.update(len(ended))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """The assistant's next turn of one conversation, or of each of several, by the model's own chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [self.tokenizer.chat(conversation) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """As generate, of one prompt, giving the output as it grows; `outputs[0].new_text` is what was added.

        Leaving the iteration early cancels the request.
        """
        request = self._request(prompt, sampling_params or SamplingParams())
        self.engine.add(request)
        try:
            shown = 0
            while True:
                # The steps of another stream bring this one's tokens too.
                while request.finish_reason is None and len(request.token_ids) == shown:
                    self.engine.step()
                shown = len(request.token_ids)
                output = request.output()
                yield output
                if output.finished:
                    return
        finally:
            self.engine.cancel(request)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        text = prompt if isinstance(prompt, str) else None
        given = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = self._token_ids(given, "the prompt")
        if not tokens:
            raise ValueError("the prompt is empty: give at least one token")
        self._token_ids(params.stop_token_ids, "stop_token_ids")
        if (params.logprobs or 0) > self.model.vocabulary:
            raise ValueError(f"logprobs is {params.logprobs}; the vocabulary has {self.model.vocabulary} tokens")
        max_tokens = self._room(len(tokens), params.max_tokens)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_tokens)
        detokenizer = Detokenizer(self.tokenizer, params.skip_special_tokens, follows_text=True)
        return Request(
            id=str(next(self._ids)),
            prompt=text,
            prompt_token_ids=tokens,
            params=params,
            max_tokens=max_tokens,
            end_tokens=ends,
            stream=TextStream(detokenizer, params.stop, params.include_stop_str_in_output),
        )

    def _token_ids(self, tokens: Sequence[int], where: str) -> list[int]:
        """Of a list, also of NumPy's integers, or of a NumPy array or a torch tensor."""
        listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        ids = [_as_id(token) for token in listed]
        for token, value in zip(ids, listed, strict=True):
            if not 0 <= token < self.model.vocabulary:
                raise ValueError(f"token {value} of {where} is outside the vocabulary of {self.model.vocabulary}")
        return ids

    def _room(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many tokens of output there can be: as asked for, but within the model's context."""
        positions, capacity = self.model.max_positions, self.cache.stats().capacity_tokens
        if prompt_tokens >= positions:
            raise ValueError(f"the prompt has {prompt_tokens} tokens; the model's context is {positions}: shorten it")
        wanted = min(max_tokens or positions, positions - prompt_tokens)
        least = prompt_tokens + (wanted if max_tokens is not None else 1)
        if self.cache.tokens_needed(least) > capacity:
            needed = self.cache.tokens_needed(least) * self.model.cache_shape.bytes_per_token
            raise ValueError(
                f"{least} tokens do not fit the cache's {capacity}: give kv_cache_bytes of {needed} or more"
            )
        return min(wanted, capacity - prompt_tokens)


def _as_tokens(value: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset(() if value is None else [value] if isinstance(value, int) else value)


def _as_id(token: int) -> int:
    try:
        return index(token)
    except TypeError:
        return -1  # nobody's


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Number)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(
            f"there are {count} prompts and {len(params)} sampling_params; give one for each, or one for all"
        )
    return list(params)
