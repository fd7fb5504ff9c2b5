"""`LLM`: a model on this machine, for use from Python."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pace.engine.engine import EngineStats
from pace.engine.intake import Prompt
from pace.engine.loader import load_engine
from pace.engine.pooling import PoolingParams
from pace.engine.request import EmbeddingOutput, Request, RequestOutput
from pace.engine.sampling_params import SamplingParams
from pace.ops import OperatorConfig

Message = Mapping[str, Any]


class LLM:
    """A language model on this machine; the arguments are those of `pace.engine.loader.load_engine`.

    Not for use from several threads at once: AsyncEngine is.
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
        **options: Any,
    ) -> None:
        self.engine = load_engine(
            model, dtype, kv_cache_bytes, cache, block_tokens, operators=operators, progress=progress, **options
        )
        self.model, self.cache, self.tokenizer = self.engine.model, self.engine.cache, self.engine.tokenizer

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What is used where a request says nothing: the model's own values."""
        return SamplingParams().with_defaults(self.engine.intake.defaults)

    def stats(self) -> EngineStats:
        """What the engine has done so far, and how full the cache is."""
        return self.engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete each prompt, a text or its token ids; results in the order of the prompts. One with images is
        {"prompt": either, "images": […]}, with the model's placeholder in the text where each stands, or its tokens.

        All prompts go through the model together. Each may have its own SamplingParams and priority (the lower number
        goes first), or all share one. use_tqdm: a bar with the throughput on stderr; None for one where there are
        several prompts, on a terminal.

        ValueError for a prompt that is empty, that has tokens which the model lacks, or that does not fit the model's
        context or the cache; then none of them runs. What goes wrong later ends a request with finish_reason "error".
        """
        asked = _asked(prompts, sampling_params or SamplingParams(), "sampling_params", priority)
        requests = [self.engine.intake.request(*each) for each in asked]
        self._complete(requests, use_tqdm)
        return [request.output() for request in requests]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[EmbeddingOutput]:
        """The embedding of each prompt, in the order of the prompts; all as in `generate`, but a prompt may take the
        whole context.
        """
        asked = _asked(prompts, pooling_params or PoolingParams(), "pooling_params", priority)
        requests = [self.engine.intake.embedding(*each) for each in asked]
        self._complete(requests, use_tqdm)
        return [request.embedding_output() for request in requests]

    def _complete(self, requests: Sequence[Request], use_tqdm: bool | None) -> None:
        try:
            self._run(requests, len(requests) > 1 if use_tqdm is None else use_tqdm, on_terminal=use_tqdm is None)
        finally:  # of an interrupted call nothing is left behind
            for request in requests:
                self.engine.cancel(request)

    def _run(self, requests: Sequence[Request], bar: bool, on_terminal: bool) -> None:
        for request in requests:
            self.engine.add(request)
        running = set(requests)
        # tqdm's None: not shown where stderr is no terminal.
        with tqdm(
            total=len(requests), unit="prompt", disable=(None if on_terminal else False) if bar else True
        ) as shown:
            rates = _Rates()
            while running:
                ended = {request for request in self.engine.step() if request.finished} & running
                running -= ended
                rates.add(ended)
                if ended:
                    shown.set_postfix_str(rates.line(self.engine.stats()), refresh=False)
                    shown.update(len(ended))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
        priority: int | Sequence[int] = 0,
        **template: Any,
    ) -> list[RequestOutput]:
        """The assistant's next turn of one conversation, or of each of several, by the model's own chat template, which
        is given what else is named (tools, documents).

        Content is a text, or a list of parts: {"type": "text", "text": …}, and for models that see {"type": "image",
        "image": a path, a file's bytes or a PIL.Image} or OpenAI's {"type": "image_url", …} with a data: URL.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [self.engine.intake.chat(conversation, **template) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm, priority)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """As generate, of one prompt, giving the output as it grows; `outputs[0].new_text` is what was added.

        Leaving the iteration early cancels the request. ValueError where best_of is to choose texts when they end.
        """
        params = sampling_params or SamplingParams()
        if params.chooses:
            raise ValueError(
                f"best_of is {params.best_of} of n {params.n}: what is chosen at the end can't be streamed"
            )
        request = self.engine.intake.request(prompt, params, priority)
        self.engine.add(request)
        try:
            shown = 0
            while True:
                # The steps of another stream bring this one's tokens too.
                while not request.finished and request.num_output_tokens == shown:
                    self.engine.step()
                shown = request.num_output_tokens
                output = request.output()
                yield output
                if output.finished:
                    return
        finally:
            self.engine.cancel(request)


class _Rates:
    """Throughput, for the bar."""

    def __init__(self) -> None:
        self._began, self._read, self._written = time.perf_counter(), 0, 0

    def add(self, ended: Iterable[Request]) -> None:
        for request in ended:
            self._read += len(request.prompt_token_ids)
            self._written += request.num_output_tokens

    def line(self, stats: EngineStats) -> str:
        seconds = time.perf_counter() - self._began
        cache = stats.cache.used_bytes / stats.cache.capacity_bytes
        hits = f", {stats.prefix_hit_rate:.0%} of prompts cached" if stats.cached_tokens else ""
        return f"in {self._read / seconds:.0f}, out {self._written / seconds:.0f} tok/s, cache {cache:.0%} full{hits}"


def _asked(prompts: Any, params: Any, name: str, priority: Any) -> Iterable[tuple[Prompt, Any, Any]]:
    """Each prompt with its parameters, which are called `name`, and its priority."""
    listed = _as_prompts(prompts)
    return zip(listed, _for_each(params, listed, name), _for_each(priority, listed, "priority"), strict=True)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping) or getattr(prompts, "ndim", 0) == 1:
        return [prompts]  # type: ignore[list-item]
    if len(prompts) and isinstance(prompts[0], Number):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _for_each(value: Any, prompts: Sequence[Prompt], name: str) -> list[Any]:
    """One for each prompt, of one for all or as many as there are."""
    if not isinstance(value, Sequence):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts and {len(value)} {name}; give one for each, or one for all")
    return list(value)
