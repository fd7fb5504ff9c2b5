"""/v1/embeddings: a vector for each prompt."""

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from pace.engine.pooling import PoolingParams

from .answers import answer
from .errors import APIError
from .protocol import Embedded
from .schemas import EmbeddingRequest
from .service import Exchange, Service, as_api_errors, begin, size_of


async def embed(service: Service, request: Request, body: EmbeddingRequest) -> Response:
    service.check_model(body.model)
    exchange = begin(service, "embeddings", request, body, len(body.prompts), size_of(body.prompts))
    return await answer(exchange, request.receive, None, lambda: _embeddings(exchange, body))


async def _embeddings(exchange: Exchange, body: EmbeddingRequest) -> dict[str, Any]:
    prompts = await asyncio.to_thread(_encode, exchange, body)
    with as_api_errors():
        params = PoolingParams(pooling=body.pooling, normalize=body.normalize)
        embedded = await exchange.embed(prompts, params, body.priority)
    count = sum(map(len, prompts))
    return {
        "object": "list",
        "model": exchange.service.config.name,
        "data": [
            {"object": "embedding", "index": i, "embedding": _written(each, body.encoding_format == "base64")}
            for i, each in enumerate(embedded)
        ],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _encode(exchange: Exchange, body: EmbeddingRequest) -> list[list[int]]:
    encode = exchange.service.tokenizer.encode
    return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]


def _written(embedded: Embedded, in_base64: bool) -> str | list[float]:
    if embedded.embedding is None:
        raise APIError(500, f"the prompt could not be embedded: {embedded.reason}")
    if in_base64:
        return base64.b64encode(embedded.embedding).decode()
    values: list[float] = np.frombuffer(embedded.embedding, np.float32).tolist()
    return values
