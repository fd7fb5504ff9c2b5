"""The routes. Each is also there without /v1, as llama-server's clients ask for it."""

from importlib.metadata import version
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
from .errors import APIError
from .guard import Guard
from .schemas import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .service import Service, as_api_errors


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="pace", version=version("pace"), docs_url=None, redoc_url=None)
    config = service.config
    _add_answers(app, service)
    _add_tokens(app, service)
    _add_states(app, service)
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
            expose_headers=["X-Request-ID"],
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
            special = next((each for each in (body.add_special_tokens, body.add_special) if each is not None), True)
            if body.messages is None:
                text = body.prompt if body.prompt is not None else body.content or ""
            else:
                use, special = tool_use(body.tools), False
                text = render(service, body.messages, use, add_generation_prompt=body.add_generation_prompt)
            tokens = tokenizer.encode(text, special)
        found = {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_positions}
        if body.return_token_strs:
            found["token_strs"] = [tokenizer.piece(token).decode(errors="replace") for token in tokens]
        return JSON(found)

    @app.post("/detokenize", responses=_ERRORS, tags=["Tokens"])
    def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        service.check_model(body.model)
        text = tokenizer.decode(body.tokens, skip_special_tokens=False)
        return JSON({"prompt": text, "content": text})


def _add_states(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["OpenAI"])
    @app.get("/models", include_in_schema=False)
    async def models() -> Response:
        """The one model that is served."""
        return JSON({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", responses=_ERRORS, tags=["OpenAI"])
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


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.config.name,
        "object": "model",
        "created": service.created,
        "owned_by": "pace",
        "root": service.config.model,
        "max_model_len": service.max_positions,
    }


# --- errors, in OpenAI's shape ---


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, APIError):
        text = f"there is no {request.url.path} here" if error.status_code == 404 else str(error.detail)
        error = APIError(error.status_code, text, headers=error.headers)
    return JSONResponse(error.body, error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    message = "the body is not JSON" if first["type"] == "json_invalid" else first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"{where[-1]} is no field that is known here: leave it out"
        where = where[-1:]
    elif where:
        message = f"{'.'.join(where)}: {message}"
    problem = APIError(400, message, param=where[0] if where else None)
    return JSONResponse(problem.body, 400)


async def _unexpected(request: Request, error: Exception) -> Response:
    problem = APIError(500, f"{type(error).__name__}: see the server's log, request {request.state.request_id}")
    return JSONResponse(problem.body, 500)
