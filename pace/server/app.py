"""The routes. Each is also there without /v1, as llama-server's clients ask for it."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .answers import JSON
from .chat.tools import tool_use
from .chats import chat, render
from .completions import complete
from .embeddings import embed
from .errors import APIError, unexpected
from .guard import Guard
from .schemas import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest, field_of
from .service import Service, as_api_errors


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="pace", version=version("pace"), docs_url=None, redoc_url=None)
    config = service.config
    _add_answers(app, service)
    _add_tokens(app, service)
    _add_states(app, service)
    _add_page(app)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(
        Guard, keys=config.keys, max_body_bytes=config.max_body_bytes, body_seconds=config.request_seconds
    )
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origin),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    return app


class Problem(BaseModel):
    """What went wrong, in OpenAI's shape."""

    class Error(BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None

    error: Error


_WORDS: dict[int | str, str] = {
    400: "The request can't be followed; the message says why.",
    401: "The server asks for a key.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "The queue is full.",
    500: "The server is at fault.",
    503: "No engine is up.",
    504: "There was no time left to answer.",
    "4XX": "The client is at fault.",  # said so that FastAPI does not name its own 422
}
_ERRORS: dict[int | str, Any] = {status: {"description": text, "model": Problem} for status, text in _WORDS.items()}
_ANY: dict[str, Any] = {"schema": {}}
_STREAMED = _ERRORS | {
    200: {"description": "Whole, or as events.", "content": {"application/json": _ANY, "text/event-stream": _ANY}}
}


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_STREAMED, tags=["OpenAI"])
    @app.post("/completions", include_in_schema=False)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Text that goes on from a prompt."""
        return await complete(service, request, body)

    @app.post("/v1/chat/completions", responses=_STREAMED, tags=["OpenAI"])
    @app.post("/chat/completions", include_in_schema=False)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """The next turn of a chat."""
        return await chat(service, request, body)

    @app.post("/v1/embeddings", responses=_ERRORS, tags=["OpenAI"])
    @app.post("/embeddings", include_in_schema=False)
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """A vector for each prompt."""
        return await embed(service, request, body)


def _add_tokens(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer

    @app.post("/tokenize", responses=_ERRORS, tags=["Tokens"])
    def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text, or of a chat as the model's template writes it."""
        service.check_model(body.model)
        with as_api_errors():
            if body.messages is None:
                text = body.prompt if body.prompt is not None else body.content or ""
            else:
                use = tool_use(body.tools)
                text, _ = render(service, body.messages, use, add_generation_prompt=body.add_generation_prompt)
            tokens = tokenizer.encode(text, body.special)
        pieces = list(map(tokenizer.piece, tokens)) if body.with_pieces or body.return_token_strs else []
        found: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_positions}
        if body.with_pieces:
            found["tokens"] = [
                {"id": token, "piece": _shown(piece)} for token, piece in zip(tokens, pieces, strict=True)
            ]
        if body.return_token_strs:
            found["token_strs"] = [piece.decode(errors="replace") for piece in pieces]
        return JSON(found)

    @app.post("/detokenize", responses=_ERRORS, tags=["Tokens"])
    def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        service.check_model(body.model)
        text = tokenizer.decode(body.tokens, skip_special_tokens=False)
        return JSON({"prompt": text, "content": text})


def _shown(piece: bytes) -> str | list[int]:
    """As llama-server shows it: text, or bytes where it is none."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _add_states(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["OpenAI"])
    @app.get("/models", include_in_schema=False)
    async def models() -> Response:
        """The one model that is served."""
        return JSON({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", responses=_ERRORS, tags=["OpenAI"])
    @app.get("/models/{name:path}", include_in_schema=False)
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSON(_model(service))

    @app.get("/health", tags=["State"])
    async def health() -> Response:
        """Whether the server is alive."""
        return JSON({"status": "ok"})

    @app.get("/ready", responses={503: {"description": "They are not."}}, tags=["State"])
    async def ready() -> Response:
        """Whether requests are taken."""
        engines = {str(engine.index): "up" if engine.up else "down" for engine in service.fleet.engines}
        status = "shutting down" if service.admission.closed else "ready" if service.ready else "not ready"
        return JSON({"status": status, "engines": engines}, 200 if service.ready else 503)

    @app.get("/metrics", tags=["State"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", tags=["State"])
    async def show_version() -> Response:
        return JSON({"version": version("pace")})


PAGE = Path(__file__).with_name("page.html")
# All is in the one file: what a model writes can load nothing, and no other site can frame the page.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data: blob:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def _add_page(app: FastAPI) -> None:
    page = PAGE.read_bytes()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return Response(page, headers=PAGE_HEADERS, media_type="text/html")


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.config.name,
        "object": "model",
        "created": service.created,
        "owned_by": "pace",
        "root": service.config.model,
        "max_model_len": service.max_positions,
        "modalities": ["text"] if service.images is None else ["text", "image"],
    }


# --- errors, in OpenAI's shape ---


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, APIError):
        text = {
            400: "the body is not JSON",
            404: f"there is no {request.url.path} here",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, str(error.detail))
        error = APIError(error.status_code, text, headers=error.headers)
    return JSONResponse(error.body, error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = max(error.errors(), key=lambda each: len(each["loc"]))  # of a union, the member that fitted best
    message, param = _told(found)
    problem = APIError(400, message, param=param)
    return JSONResponse(problem.body, 400)


def _told(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """What is wrong, and the field."""
    where = [str(part) for part in error["loc"][1:]]
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        return "the body is not JSON", None
    if error["type"] == "extra_forbidden":
        return f"{where[-1]} is no field that is known here: leave it out", where[-1]
    if not where and error["type"] != "value_error":
        return "the body must be a JSON object, with Content-Type: application/json", None
    if not where:
        return message, field_of(message)
    return f"{'.'.join(part for part in where if not _TYPE.fullmatch(part))}: {message}", where[0]


_TYPE = re.compile(r"str|int|constrained-\w+|[\w-]+\[.*\]")  # the member of a union, in a place that pydantic names


async def _unexpected(request: Request, error: Exception) -> Response:
    problem = unexpected(error, request.state.request_id)
    return JSONResponse(problem.body, 500, {"X-Request-ID": request.state.request_id})
