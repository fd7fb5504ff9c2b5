"""From prompts to what the engines write: admission, deadline, meter and log line of one HTTP request."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from pace.engine.pooling import PoolingParams
from pace.engine.sampling_params import SamplingParams
from pace.engine.tokenizer import Tokenizer

from .admission import BYTES_PER_TOKEN, Admission, Ticket
from .chat.formats import Format
from .config import ServerConfig
from .errors import APIError
from .fleet import EngineBusy, EngineLost, Fleet, NoEngine, RequestFailed, RequestRefused, ShuttingDown
from .metrics import Metrics, RequestMeter
from .protocol import Embed, Embedded, Generate, Progress, fields_of
from .schemas import EmbeddingRequest, Sampled, field_of

if TYPE_CHECKING:
    from pace.models.images import ImageProcessor

    from .tracing import Span, Tracing

logger = logging.getLogger("pace.requests")

DECODED_AT_ONCE = 2  # requests with images: texts find a thread beside them, and memory is bounded

Prompt = str | list[int]
Asked = Sampled | EmbeddingRequest


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    config: ServerConfig
    tokenizer: Tokenizer
    format: Format
    fleet: Fleet
    admission: Admission
    metrics: Metrics
    max_positions: int
    images: "ImageProcessor | None"  # of a model that sees
    tracing: "Tracing | None" = None
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DECODED_AT_ONCE))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def ready(self) -> bool:
        return any(engine.up for engine in self.fleet.engines) and not self.admission.closed

    async def close(self) -> None:
        await self.fleet.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    def check_model(self, model: str | None) -> None:
        """APIError 404 for a model that is not the one served."""
        if model is not None and model != self.config.name:
            raise APIError(
                404,
                f"the model {model!r} is not served here; {self.config.name!r} is",
                code="model_not_found",
                param="model",
            )


@dataclass
class Exchange:
    """One HTTP request on its way."""

    service: Service
    endpoint: str
    body: Asked
    request_id: str
    meter: RequestMeter
    ticket: Ticket
    figures: dict[str, Any] = field(default_factory=dict)
    span: "Span | None" = None
    _answers: dict[tuple[int, int], str] = field(default_factory=dict)  # by prompt and text, where they are logged

    async def generate(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        priority: int,
        whole: bool,
        images: Sequence[bytes] = (),
    ) -> AsyncGenerator[tuple[int, Progress]]:
        """The news of all prompts as they come, each with its prompt's number. images: those of each prompt."""
        self.check_lengths(prompts)
        wishes = [
            Generate(f"{self.request_id}.{i}", prompt, fields_of(each), priority, list(images))
            for i, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        self._see_prompts(prompts)
        streams = [self._stream(i, wish, whole) for i, wish in enumerate(wishes)]
        async with aclosing(streams[0] if len(streams) == 1 else together(streams)) as news:
            async for each in news:
                yield each

    async def _stream(self, number: int, wish: Generate, whole: bool) -> AsyncGenerator[tuple[int, Progress]]:
        """A seed for the n-th text is the engine's to spread; a prompt's own is what it was given."""
        try:
            async with aclosing(self.service.fleet.generate(wish, whole, self.meter)) as news:
                async for progress in news:
                    self._see_pieces(number, progress)
                    if progress.finished:
                        self.count(output_tokens=progress.completion_tokens, cached_tokens=progress.cached_tokens)
                        if progress.drafted:
                            self.count(drafted=progress.drafted, accepted=progress.accepted)
                    yield number, progress
        except RequestRefused as error:
            form = isinstance(self.body, Sampled) and self.body.form  # as the client calls it
            raise RequestRefused(str(error).replace("structured_outputs", form or "tools")) from None

    async def embed(self, prompts: Sequence[list[int]], params: PoolingParams, priority: int) -> list[Embedded]:
        self.check_lengths(prompts)
        self._see_prompts(prompts)
        fields = {"pooling": params.pooling, "normalize": params.normalize}
        tasks = [
            asyncio.ensure_future(
                self.service.fleet.embed(Embed(f"{self.request_id}.{i}", prompt, fields, priority), self.meter)
            )
            for i, prompt in enumerate(prompts)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def check_lengths(self, prompts: Sequence[list[int]]) -> None:
        """ValueError, as an engine would say it, for a prompt that is so long that to read it would keep the engine."""
        for prompt in prompts:
            if len(prompt) > (most := self.service.max_positions):
                raise ValueError(f"the prompt has {len(prompt)} tokens; the model's context is {most}: shorten it")

    def _see_prompts(self, prompts: Sequence[list[int]]) -> None:
        tokens = sum(map(len, prompts))
        self.count(prompt_tokens=tokens)
        self.service.metrics.prompt_tokens.inc(tokens)
        if self.service.config.log_prompts:
            decode = self.service.tokenizer.decode
            self.figures["prompts"] = [decode(prompt, skip_special_tokens=False) for prompt in prompts]

    def _see_pieces(self, number: int, progress: Progress) -> None:
        for piece in progress.pieces:
            if piece.finish_reason is not None:
                self.figures.setdefault("finish_reasons", []).append(piece.finish_reason)
            if self.service.config.log_prompts:
                text = number, piece.index
                self._answers[text] = self._answers.get(text, "") + piece.text

    def count(self, **tokens: int) -> None:
        for name, number in tokens.items():
            self.figures[name] = self.figures.get(name, 0) + number

    def close(self, outcome: str, reason: str | None = None) -> None:
        """At its end, once: what there is to count, and the line of the log."""
        self.ticket.leave()
        metrics, figures, seconds = self.service.metrics, self.figures, self.meter.seconds
        metrics.requests.labels(self.endpoint, outcome).inc()
        metrics.duration.observe(seconds)
        metrics.cached_tokens.inc(figures.get("cached_tokens", 0))
        texts = self.ticket.texts
        later = figures.get("output_tokens", 0) - texts  # than the first of each text
        if self.meter.first is not None and later > 0:
            metrics.per_output_token.observe((seconds - self.meter.first) * texts / later)
        if self.span is not None:
            self.span.end(outcome, reason, figures, self.meter.first)
        if self._answers:
            figures["answers"] = [self._answers[text] for text in sorted(self._answers)]
        first = None if self.meter.first is None else round(self.meter.first, 4)
        line = {"request_id": self.request_id, "endpoint": self.endpoint, "outcome": outcome, "reason": reason}
        logger.info("request", extra={"figures": line | figures | {"first_token": first, "seconds": round(seconds, 4)}})


def begin(service: Service, endpoint: str, request: Request, body: Asked, texts: int, size: int) -> Exchange:
    """size: of the prompts, in bytes of text. APIError where the queue is full, before anything is done."""
    if isinstance(body, Sampled) and body.request_id is not None:
        request.state.request_id = body.request_id
    try:
        ticket = _admitted(service, texts, size)
    except APIError:
        service.metrics.requests.labels(endpoint, "rejected").inc()
        raise
    meter = RequestMeter(service.metrics, ticket.begun)
    figures = {name: getattr(body, name, None) for name in ("user", "metadata")}
    exchange = Exchange(service, endpoint, body, request.state.request_id, meter, ticket, figures)
    if service.tracing is not None:
        name = service.config.name
        exchange.span = service.tracing.begin(endpoint, exchange.request_id, name, request.headers, body)
    return exchange


def _admitted(service: Service, texts: int, size: int) -> Ticket:
    if texts > service.config.max_texts:
        raise APIError(400, f"the request asks for {texts} texts; max_texts is {service.config.max_texts}", param="n")
    return service.admission.enter(texts, size // BYTES_PER_TOKEN + 1)


def size_of(prompts: Sequence[Prompt]) -> int:
    return sum(len(prompt) * (1 if isinstance(prompt, str) else BYTES_PER_TOKEN) for prompt in prompts)


@contextmanager
def as_api_errors() -> Iterator[None]:
    """What engines and parameters say, as a status."""
    try:
        yield
    except EngineBusy as error:
        raise APIError(429, str(error), code="queue_full", retry_after=1) from None
    except NoEngine as error:
        raise APIError(503, str(error), code="no_engine", retry_after=5) from None
    except EngineLost as error:
        raise APIError(500, str(error), code="engine_lost") from None
    except ShuttingDown as error:
        raise APIError(503, str(error), code="shutting_down", retry_after=5) from None
    except RequestFailed as error:
        raise APIError(500, str(error)) from None
    except ValueError as error:
        raise APIError(400, str(error), param=field_of(str(error))) from None


async def together(streams: Sequence[AsyncGenerator[Any]]) -> AsyncGenerator[Any]:
    """Several streams as one. What one raises ends all."""
    queue: asyncio.Queue[tuple[Any, Exception | None] | None] = asyncio.Queue(maxsize=len(streams))

    async def forward(stream: AsyncGenerator[Any]) -> None:
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    await queue.put((item, None))
        except Exception as error:
            await queue.put((None, error))
        else:
            await queue.put(None)

    tasks = [asyncio.ensure_future(forward(stream)) for stream in streams]
    left = len(tasks)
    try:
        while left:
            news = await queue.get()
            if news is None:
                left -= 1
                continue
            item, error = news
            if error is not None:
                raise error
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
