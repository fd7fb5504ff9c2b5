"""/v1/completions: text that goes on from a prompt."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pace.engine.request import Logprobs

from .answers import Counts, answer, check_end, prompt_logprobs, with_errors
from .protocol import Piece, Progress
from .schemas import CompletionRequest
from .service import Exchange, Service, as_api_errors, begin, size_of


async def complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    service.check_model(body.model)
    texts = len(body.prompts) * max(body.n or 1, body.best_of or 1)
    exchange = begin(service, "completions", request, body, texts, size_of(body.prompts))
    job = _Completion(exchange, body)
    return await answer(exchange, request.receive, with_errors(job.events()) if body.stream else None, job.whole)


class _Completion:
    def __init__(self, exchange: Exchange, body: CompletionRequest) -> None:
        self.exchange, self.body = exchange, body
        self.tokenizer, self.name = exchange.service.tokenizer, exchange.service.config.name
        self.head = {"id": f"cmpl-{exchange.request_id}", "object": "text_completion", "created": int(time.time())}
        self.n = body.n or 1
        self.offsets: dict[int, int] = {}  # of each text, where its next token begins

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        with as_api_errors():
            async for number, progress in self._news(whole=True):
                for piece in progress.pieces:
                    index = number * self.n + piece.index
                    choices[index] = self._choice(number, piece, progress)
        return self._body([choices[index] for index in sorted(choices)]) | {"usage": self.counts.usage()}

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        options = self.body.stream_options
        wants_usage = options is not None and options.include_usage
        begun: set[int] = set()
        async for number, progress in self._news(whole=False):
            for piece in progress.pieces:
                index = number * self.n + piece.index
                event = self._body([self._choice(number, piece, progress, first=index not in begun)])
                begun.add(index)
                if wants_usage:
                    event["usage"] = self.counts.usage() if options and options.continuous_usage_stats else None
                yield event
        if wants_usage:
            yield self._body([]) | {"usage": self.counts.usage()}

    async def _news(self, whole: bool) -> AsyncGenerator[tuple[int, Progress]]:
        body = self.body
        self.prompts = await asyncio.to_thread(self._encode)
        self.counts = Counts(self.prompts)
        of_prompt = (body.prompt_logprobs, body.logprobs if body.echo else None)
        params = body.sampling(
            max_tokens=body.max_tokens or (1 if body.max_tokens == 0 else None),
            logprobs=body.logprobs,
            prompt_logprobs=max((most for most in of_prompt if most is not None), default=None),
        )
        async for number, progress in self.exchange.generate(
            self.prompts, [params] * len(self.prompts), body.priority, whole
        ):
            self.counts.see(number, progress, written=body.max_tokens != 0)
            for piece in progress.pieces:
                check_end(piece)
            yield number, progress

    def _encode(self) -> list[list[int]]:
        prompts = [
            self.tokenizer.encode(prompt, self.body.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in self.body.prompts
        ]
        last = self.body.truncate_prompt_tokens
        return [prompt[-last:] for prompt in prompts] if last else prompts

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.head | {"model": self.name, "choices": choices}

    def _choice(self, number: int, piece: Piece, progress: Progress, first: bool = True) -> dict[str, Any]:
        index, body = number * self.n + piece.index, self.body
        writes = body.max_tokens != 0
        text = self._echoed(number) if body.echo and first else ""
        logprobs = None
        if body.logprobs is not None:
            rows: list[tuple[int, Logprobs | None]] = []
            if body.echo and progress.prompt_logprobs is not None:
                rows += zip(self.prompts[number], progress.prompt_logprobs, strict=True)
            if writes:
                rows += piece.rows
            logprobs = self._logprobs(index, rows, body.logprobs)
        choice = {
            "index": index,
            "text": text + (piece.text if writes else ""),
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason if writes else "length",
            "stop_reason": piece.stop_reason if writes else None,
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(progress)
        if body.return_token_ids:
            choice |= {"token_ids": piece.token_ids if writes else []}
            choice |= {"prompt_token_ids": self.prompts[number]} if first else {}
        return choice

    def _echoed(self, number: int) -> str:
        given, last = self.body.prompts[number], self.body.truncate_prompt_tokens
        if isinstance(given, str) and (last is None or len(self.prompts[number]) < last):
            return given
        return self.tokenizer.decode(self.prompts[number], skip_special_tokens=False)

    def _logprobs(self, index: int, rows: list[tuple[int, Logprobs | None]], top: int) -> dict[str, Any]:
        tokens = [
            self.tokenizer.decode([token], skip_special_tokens=False) if row is None else row[token].decoded_token
            for token, row in rows
        ]
        offsets, at = [], self.offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self.offsets[index] = at
        return {
            "tokens": tokens,
            "token_logprobs": [None if row is None else row[token].logprob for token, row in rows],
            "top_logprobs": [None if row is None else _top(row, token, top) for token, row in rows],
            "text_offset": offsets,
        }


def _top(row: Logprobs, token: int, top: int) -> dict[str, float]:
    """Of two tokens that look alike, the more probable is shown."""
    shown: dict[str, float] = {}
    for value in sorted(row.values(), key=lambda value: value.rank):
        if value.rank <= top or value is row[token]:
            shown.setdefault(value.decoded_token, value.logprob)
    return shown
