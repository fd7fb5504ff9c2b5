"""A span for each request, sent to an OpenTelemetry collector in batches. Imported only where that is asked for.

The names are those of OpenTelemetry's semantic conventions for generative AI.
"""

import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

OPERATIONS = {"completions": "text_completion", "chat": "chat", "embeddings": "embeddings"}
FIGURES = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
}
ASKED = {
    "gen_ai.request.max_tokens": ("max_completion_tokens", "max_tokens"),
    "gen_ai.request.temperature": ("temperature",),
    "gen_ai.request.top_p": ("top_p",),
    "gen_ai.request.choice.count": ("n",),
    "gen_ai.request.seed": ("seed",),
    "gen_ai.request.stream": ("stream",),
}


class Tracing:
    """endpoint: of the collector; without a path, /v1/traces is meant. The environment variables OTEL_SERVICE_NAME,
    OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_… and OTEL_EXPORTER_OTLP_HEADERS have their usual meaning.
    """

    def __init__(self, endpoint: str) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "pace")
        resource = Resource.create({"service.name": name, "service.version": version("pace")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=_with_path(endpoint))))
        self._tracer = self._provider.get_tracer("pace")

    def begin(self, endpoint: str, request_id: str, model: str, headers: Mapping[str, str], body: object) -> "Span":
        """The request's own span, below that of its traceparent header."""
        attributes = {
            "gen_ai.operation.name": OPERATIONS[endpoint],
            "gen_ai.provider.name": "pace",
            "gen_ai.request.model": model,
            "pace.request_id": request_id,
        }
        for name, fields in ASKED.items():
            given = (getattr(body, field, None) for field in fields)
            if (value := next((each for each in given if each is not None), None)) is not None:
                attributes[name] = value
        parent = TraceContextTextMapPropagator().extract(headers)
        return Span(self._tracer.start_span(endpoint, context=parent, kind=SpanKind.SERVER, attributes=attributes))

    def close(self) -> None:
        """Send what there is; blocks, for as long as the exporter waits for the collector."""
        self._provider.shutdown()


class Span:
    def __init__(self, span: Any) -> None:
        self._span, self._began = span, time.time_ns()

    def end(self, outcome: str, reason: str | None, figures: Mapping[str, Any], first: float | None) -> None:
        """first: seconds to the first token."""
        span = self._span
        span.set_attribute("pace.outcome", outcome)
        for figure, name in FIGURES.items():
            if figure in figures:
                span.set_attribute(name, figures[figure])
        if finish := figures.get("finish_reasons"):
            span.set_attribute("gen_ai.response.finish_reasons", finish)
        if first is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", first)
            span.add_event("first token", timestamp=self._began + int(first * 1e9))
        if outcome == "error":
            span.set_attribute("error.type", "_OTHER")  # the conventions' word where there is no class of errors
            span.set_status(Status(StatusCode.ERROR, reason))
        span.end()


def _with_path(endpoint: str) -> str:
    scheme, _, rest = endpoint.partition("://")
    if scheme not in ("http", "https") or not rest:
        raise ValueError(f"otlp_endpoint is {endpoint!r}; it must be a URL, such as http://127.0.0.1:4318")
    return endpoint if "/" in rest.rstrip("/") else f"{endpoint.rstrip('/')}/v1/traces"
