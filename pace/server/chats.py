"""/v1/chat/completions: the next turn of a chat, with its thinking and its calls of tools told from the content."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pace.engine.chat_template import variables
from pace.engine.images import NO_IMAGES, Source, expanded, read, taken
from pace.engine.request import Logprob, Logprobs
from pace.engine.sampling_params import SamplingParams
from pace.engine.structured import StructuredOutputsParams

from .admission import BYTES_PER_TOKEN
from .answers import Counts, answer, check_end, prompt_logprobs, with_errors
from .chat.parser import Delta, Parser
from .chat.prompts import prompt_messages, text_of
from .chat.tool_calls import ToolCall
from .chat.tools import ToolUse, tool_use
from .errors import APIError
from .protocol import Piece, Progress
from .schemas import ChatRequest, Message
from .service import Exchange, Service, as_api_errors, begin


async def chat(service: Service, request: Request, body: ChatRequest) -> Response:
    service.check_model(body.model)
    texts = max(body.n or 1, body.best_of or 1)
    exchange = begin(service, "chat", request, body, texts, _size(service, body))
    job = _Chat(exchange, body)
    return await answer(exchange, request.receive, with_errors(job.events()) if body.stream else None, job.whole)


def _size(service: Service, body: ChatRequest) -> int:
    """Of the prompt, in bytes of text. APIError for images that can't be taken."""
    images = sum(each.images for each in body.messages)
    if images and service.images is None:
        raise APIError(400, NO_IMAGES, param="messages")
    if images > (most := service.config.max_images):
        raise APIError(400, f"the messages have {images} images; max_images is {most}", param="messages")
    if images and body.truncate_prompt_tokens:
        raise APIError(400, "a prompt with images can't be truncated", param="truncate_prompt_tokens")
    tokens = images * service.images.tokens_per_image if service.images is not None else 0
    return sum(each.characters for each in body.messages) + tokens * BYTES_PER_TOKEN


class _Chat:
    def __init__(self, exchange: Exchange, body: ChatRequest) -> None:
        self.exchange, self.body, self.service = exchange, body, exchange.service
        self.head = {"id": f"chatcmpl-{exchange.request_id}", "created": int(time.time())}

    async def whole(self) -> dict[str, Any]:
        with as_api_errors():
            async for _, progress in self._news(whole=True):
                choices = [self._choice(piece) for piece in progress.pieces]
        choices.sort(key=lambda choice: choice["index"])
        body = self._body("chat.completion", choices) | {"usage": self.counts.usage()}
        if self.body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(progress)
        if self.body.return_token_ids:
            body["prompt_token_ids"] = self.prompt
        return body

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        options = self.body.stream_options
        wants_usage = options is not None and options.include_usage
        writers: dict[int, _Writer] = {}
        async for _, progress in self._news(whole=False):
            for piece in progress.pieces:
                if (writer := writers.get(piece.index)) is None:
                    writer = writers[piece.index] = _Writer(self)
                    first = self._event(piece.index, {"role": "assistant", "content": ""}, wants_usage)
                    yield first | ({"prompt_token_ids": self.prompt} if self.body.return_token_ids else {})
                for delta, extra in writer.deltas(piece):
                    yield self._event(piece.index, delta, wants_usage, **extra)
        if wants_usage:
            yield self._body("chat.completion.chunk", []) | {"usage": self.counts.usage()}

    def _event(self, index: int, delta: dict[str, Any], wants_usage: bool, **extra: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | extra
        event = self._body("chat.completion.chunk", [choice])
        if wants_usage:
            options = self.body.stream_options
            event["usage"] = self.counts.usage() if options and options.continuous_usage_stats else None
        return event

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.head | {"object": kind, "model": self.service.config.name, "choices": choices}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        parser = self.parser()
        parts = [parser.push(piece.text), parser.finish()]
        calls = self.kept(sum((part.tool_calls for part in parts), ()))
        content, reasoning = ("".join(getattr(part, name) for part in parts) for name in ("content", "reasoning"))
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if reasoning and self.body.include_reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [_written(call) for call in calls]
        choice = {
            "index": piece.index,
            "message": message,
            "logprobs": self.logprobs(piece),
            "finish_reason": "tool_calls" if calls and piece.finish_reason == "stop" else piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        return choice | ({"token_ids": piece.token_ids} if self.body.return_token_ids else {})

    # --- from the request to the engine ---

    async def _news(self, whole: bool) -> AsyncGenerator[tuple[int, Progress]]:
        self.use = tool_use(self.body.tools, self.body.tool_choice, self.body.parallel_tool_calls is not False)
        params = self._params()
        async with self.service.decoding if any(each.images for each in self.body.messages) else nullcontext():
            self.prompt, images = await asyncio.to_thread(self._encode, params)
        self.counts = Counts([self.prompt])
        async for number, progress in self.exchange.generate(
            [self.prompt], [params], self.body.priority, whole, images
        ):
            self.counts.see(number, progress)
            for piece in progress.pieces:
                check_end(piece)
            yield number, progress

    def _params(self) -> SamplingParams:
        body, changes = self.body, dict[str, Any]()
        if self.use.grammar is not None:
            if body.structured() is not None:
                raise ValueError("tool_choice and a form of the text can't both be followed: give one")
            changes["structured_outputs"] = self.use.grammar
        if self.service.format.keeps_special_tokens(bool(self.use.shown)):
            changes["skip_special_tokens"] = False
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        return body.sampling(max_tokens=most, logprobs=(body.top_logprobs or 0) if body.logprobs else None, **changes)

    def _encode(self, params: SamplingParams) -> tuple[list[int], list[bytes]]:
        """The prompt's tokens, and its images as Generate has them."""
        self.formed = params.structured_outputs is not None
        messages, goes_on = self.body.messages, self.body.continue_final_message
        arguments = self._template_arguments(params.structured_outputs)
        text, sources = render(self.service, _marked(messages) if goes_on else messages, self.use, **arguments)
        self.text = _up_to_mark(text) if goes_on else text
        processor, tokens = self.service.images, self.service.tokenizer.encode(self.text, add_special_tokens=False)
        if processor is None or not sources:
            last = self.body.truncate_prompt_tokens
            return tokens[-last:] if last else tokens, []
        self.exchange.check_lengths([tokens])  # before an image is looked at
        most = self.service.config.max_image_pixels
        return tokens, [read(source, processor, most).values.tobytes() for source in sources]

    def _template_arguments(self, formed: StructuredOutputsParams | None) -> dict[str, Any]:
        """APIError for what the model's template would pass over."""
        body, known = self.body, template_variables(self.service)
        given = dict(body.chat_template_kwargs or {})
        if unknown := given.keys() - known:
            message = f"the model's chat template does not know {', '.join(sorted(unknown))}"
            raise APIError(400, message, param="chat_template_kwargs")
        if own := given.keys() & {"messages", "tools"}:
            message = f"{', '.join(sorted(own))} can't be given in chat_template_kwargs: they are fields of the request"
            raise APIError(400, message, param="chat_template_kwargs")
        if body.documents is not None:
            if "documents" not in known:
                raise APIError(400, "the model's chat template does not know documents", param="documents")
            given["documents"] = body.documents
        if body.reasoning_effort is not None:
            if "reasoning_effort" in known:
                given["reasoning_effort"] = body.reasoning_effort
            elif "enable_thinking" in known:
                given["enable_thinking"] = body.reasoning_effort != "none"
            else:
                raise APIError(400, "the model can't be told how much to think", param="reasoning_effort")
        if formed is not None and "enable_thinking" in known:
            given["enable_thinking"] = False  # the form leaves no room for it
        return {"add_generation_prompt": body.add_generation_prompt and not body.continue_final_message} | given

    # --- from the engine to the answer ---

    def parser(self) -> Parser:
        if self.use.grammar is not None:
            return Parser.of_forced_calls()
        format = self.service.format
        return Parser(format, tools=bool(self.use.shown), reasoning=not self.formed, prompt=self.text)

    def kept(self, calls: tuple[ToolCall, ...], before: int = 0) -> tuple[ToolCall, ...]:
        """One call where that is what was asked for."""
        return calls[: max(1 - before, 0)] if self.body.parallel_tool_calls is False else calls

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": [self._logprob(token, row) for token, row in piece.rows], "refusal": None}

    def _logprob(self, token: int, row: Logprobs) -> dict[str, Any]:
        top = sorted(row.items(), key=lambda item: item[1].rank)[: self.body.top_logprobs or 0]
        return self._entry(token, row[token]) | {"top_logprobs": [self._entry(*item) for item in top]}

    def _entry(self, token: int, value: Logprob) -> dict[str, Any]:
        piece = self.service.tokenizer.piece(token)
        return {"token": value.decoded_token, "logprob": value.logprob, "bytes": list(piece)}


class _Writer:
    """One text of a stream."""

    def __init__(self, job: _Chat) -> None:
        self._job, self._parser, self._calls = job, job.parser(), 0

    def deltas(self, piece: Piece) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Of each event its delta, and what stands beside it. Log-probabilities come with the first."""
        events = self._changes(self._parser.push(piece.text))
        if piece.finish_reason is not None:
            events += self._changes(self._parser.finish())
        beside: dict[str, Any] = {"logprobs": self._job.logprobs(piece)} if self._job.body.logprobs else {}
        if self._job.body.return_token_ids:
            beside["token_ids"] = piece.token_ids
        if beside and not events:
            events.append({})
        told = [(event, beside if i == 0 else {}) for i, event in enumerate(events)]
        if piece.finish_reason is not None:
            reason = "tool_calls" if self._calls and piece.finish_reason == "stop" else piece.finish_reason
            told.append(({}, {"finish_reason": reason, "stop_reason": piece.stop_reason}))
        return told

    def _changes(self, delta: Delta) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if delta.reasoning and self._job.body.include_reasoning:
            events.append({"reasoning_content": delta.reasoning})
        if delta.content:
            events.append({"content": delta.content})
        for call in self._job.kept(delta.tool_calls, self._calls):
            events.append({"tool_calls": [{"index": self._calls} | _written(call)]})
            self._calls += 1
        return events


def _written(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def render(service: Service, messages: list[Message], use: ToolUse, /, **arguments: Any) -> tuple[str, list[Source]]:
    """The text of a chat, with the tokens of each image where it stands, and the images. ValueError where the template
    refuses it, and for images that are not in it.
    """
    plain, sources = taken([message.model_dump(exclude_none=True) for message in messages])
    if sources and service.images is None:
        raise APIError(400, NO_IMAGES, param="messages")
    chat, tools = prompt_messages(plain, use.shown, service.format)
    text = service.tokenizer.chat_text(chat, tools=tools, **arguments)
    if service.images is not None and sources:
        text = expanded(text, len(sources), service.images)
    return text, sources


def template_variables(service: Service) -> set[str]:
    return set().union(*map(variables, service.tokenizer.chat_templates.values()))


def _marked(messages: list[Message]) -> list[Message]:
    """With a mark at the end of the last: what it says may also stand in what the template writes behind it."""
    last = messages[-1]
    said = text_of(last.model_dump(exclude_none=True).get("content")).rstrip()
    return [*messages[:-1], last.model_copy(update={"content": said and said + _MARK})]


def _up_to_mark(prompt: str) -> str:
    text, mark, _ = prompt.rpartition(_MARK)
    if not mark:
        raise APIError(400, "continue_final_message needs a last message with text", param="continue_final_message")
    return text


_MARK = "<|pace: the end of the final message|>"
