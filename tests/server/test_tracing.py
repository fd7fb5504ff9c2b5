"""What is told of a request beside its answer: spans at an OpenTelemetry collector, prompts in the log."""

import http.server
import json
import re
import sys
import threading
import time

import pytest

from pace.server.service import Service

from .running import Server

FLAGS = ("--engines", 1, "--kv-cache-bytes", "2M", "--served-model-name", "tiny")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes what is posted, as protobuf."""

    def __init__(self):
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
        self.spans, self.resources, self.paths = [], [], set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805
                self._take(handler.path, handler.rfile.read(int(handler.headers["content-length"])))
                handler.send_response(200)
                handler.end_headers()

            def log_message(self, *_):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def _take(self, path, body):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.paths.add(path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(values(resource.resource.attributes))
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()


def values(attributes):
    found = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory):
    """The spans of some requests, and the answers to them."""
    log, answers = tmp_path_factory.mktemp("traced") / "log", {}
    with Collector() as collector:
        with Server(tiny, *FLAGS, "--otlp-endpoint", collector.url, log=log) as server:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "plain"}
            body = {"prompt": "abc", "max_tokens": 5, "temperature": 0.0, "n": 2, "ignore_eos": True}
            answers["plain"] = server.client.post("/v1/completions", json=body, headers=headers).json()
            body = {"prompt": "abc", "max_tokens": 5, "stream": True}
            server.client.post("/v1/completions", json=body, headers={"x-request-id": "streamed"})
            server.client.post("/v1/completions", json={"prompt": []}, headers={"x-request-id": "refused"})
            server.client.post("/v1/embeddings", json={"input": "abc"}, headers={"x-request-id": "embedded"})
        yield collector, answers


def span_of(traced, request_id):
    (span,) = [span for span in traced[0].spans if values(span.attributes)["pace.request_id"] == request_id]
    return span, values(span.attributes)


def test_a_span_has_what_is_known_of_its_request(traced):
    span, attributes = span_of(traced, "plain")
    usage = traced[1]["plain"]["usage"]
    assert span.name == "completions"
    assert span.kind == span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "pace",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.response.finish_reasons": ["length", "length"],
        "pace.request_id": "plain",
        "pace.outcome": "ok",
    }
    assert span.status.code == span.status.STATUS_CODE_UNSET


def test_the_first_token_is_an_event_between_beginning_and_end(traced):
    for request_id in ("plain", "streamed"):
        span, _ = span_of(traced, request_id)
        (event,) = span.events
        assert event.name == "first token"
        assert span.start_time_unix_nano < event.time_unix_nano < span.end_time_unix_nano


def test_without_a_parent_a_span_is_the_first_of_its_trace(traced):
    span, attributes = span_of(traced, "streamed")
    assert span.parent_span_id == b""
    assert attributes["gen_ai.request.stream"] is True


def test_other_endpoints_have_their_names(traced):
    span, attributes = span_of(traced, "embedded")
    assert (span.name, attributes["gen_ai.operation.name"]) == ("embeddings", "embeddings")
    assert "gen_ai.response.finish_reasons" not in attributes


def test_the_collector_is_asked_where_it_listens_for_traces(traced):
    assert traced[0].paths == {"/v1/traces"}
    assert {resource["service.name"] for resource in traced[0].resources} == {"pace"}


def test_an_error_is_one_of_the_span(tiny, tmp_path):
    with Collector() as collector:
        flags = ("--otlp-endpoint", f"{collector.url}/elsewhere", "--request-seconds", 0.1)
        with Server(tiny, *FLAGS, *flags, log=tmp_path / "log") as server:
            assert server.post("/v1/completions", prompt="abc", n=8, max_tokens=400, ignore_eos=True).status_code == 504
        (span,) = collector.spans
        assert span.status.code == span.status.STATUS_CODE_ERROR
        assert "not answered within 0.1 s" in span.status.message
        assert values(span.attributes)["pace.outcome"] == "error"
        assert collector.paths == {"/elsewhere"}


def test_a_collector_that_is_not_there_delays_no_answer_and_no_end(tiny, tmp_path):
    with Server(tiny, *FLAGS, "--otlp-endpoint", "http://127.0.0.1:9", log=tmp_path / "log") as server:
        began = time.monotonic()
        assert server.post("/v1/completions", prompt="abc").status_code == 200
        assert time.monotonic() - began < 5
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 20


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://"])
def test_an_endpoint_that_is_no_url_ends_the_server_before_it_begins(tiny, tmp_path, endpoint):
    server = Server(tiny, *FLAGS, "--otlp-endpoint", endpoint, log=tmp_path / "log", wait=False)
    assert server.process.wait(60) != 0
    assert "otlp_endpoint" in server.text
    assert "Traceback" not in server.text


def test_without_the_extra_it_is_named(tiny, tmp_path):
    """FastAPI itself brings opentelemetry's interface, but not what sends."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['opentelemetry.sdk'] = None")
    env = {"PYTHONPATH": str(tmp_path)}
    flags = (*FLAGS, "--otlp-endpoint", "http://127.0.0.1:9")
    server = Server(tiny, *flags, log=tmp_path / "log", wait=False, env=env)
    assert server.process.wait(60) != 0
    assert "pip install 'pace[otel]'" in server.text
    assert "Traceback" not in server.text
    with Server(tiny, *FLAGS, log=tmp_path / "log", env=env) as server:  # who does not ask does not need it
        assert server.post("/v1/completions", prompt="abc").status_code == 200


def test_it_is_not_imported_unless_asked_for():
    assert Service.__module__ in sys.modules
    assert "pace.server.tracing" not in sys.modules


@pytest.mark.parametrize("form", [(), ("--log-json",)], ids=["plain", "json"])
def test_prompts_are_logged_where_that_is_asked_for(tiny, tmp_path, form):
    with Server(tiny, *FLAGS, *form, "--log-prompts", log=tmp_path / "log") as server:
        body = {"prompt": ["ab c", 'd"e\n'], "max_tokens": 4, "n": 2, "seed": 1, "ignore_eos": True}
        choices = server.post("/v1/completions", **body).json()["choices"]
        server.post("/v1/embeddings", input="sky")
        first, second = [line for line in server.text.splitlines() if "request_id" in line]
    answers = [choice["text"] for choice in choices]
    if form:
        assert json.loads(first)["prompts"] == body["prompt"]
        assert json.loads(first)["answers"] == answers
        assert json.loads(second)["prompts"] == ["sky"]
        assert "answers" not in json.loads(second)
    else:
        assert f"prompts={json.dumps(body['prompt'])}" in first
        assert f"answers={json.dumps(answers, ensure_ascii=False)}" in first


def test_prompts_and_answers_are_not_logged_otherwise(tiny, tmp_path):
    with Server(tiny, *FLAGS, "--log-json", log=tmp_path / "log") as server:
        server.post("/v1/completions", prompt="a secret", max_tokens=4)
        (line,) = [json.loads(line) for line in server.text.splitlines() if "request_id" in line]
        assert "secret" not in server.text
    assert line.keys() == {
        *("time", "level", "message", "request_id", "endpoint", "outcome", "prompt_tokens", "output_tokens"),
        *("cached_tokens", "finish_reasons", "first_token", "seconds"),
    }


def test_a_request_that_is_not_let_in_is_counted(server):
    def rejected():
        page = server.client.get("/metrics").text
        return sum(float(n) for n in re.findall(r'pace_requests_total{endpoint="chat",outcome="rejected"} (\S+)', page))

    before = rejected()
    assert server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], n=65).status_code == 400
    assert rejected() == before + 1
