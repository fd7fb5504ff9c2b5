"""The server is hard to kill: engines and nodes that are killed or hang, clients that go or dawdle, hostile requests,
full queues and disks. Each ends as it should: nothing hangs, nothing is left.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from statistics import median

import httpx
import psutil
import pytest
import requests
import schemathesis.specs.openapi.schemas  # loaded late, it would be parsed beside other threads, which 3.11 can not
from hypothesis import HealthCheck, Phase, given, settings

from tests.engine.fakes import write_model

from .conftest import TEMPLATE
from .running import Server, alive

CONTEXT = 1 << 15
MIB = 1 << 20


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """The directory of a tiny random model whose texts go on for as long as a test wants."""
    path = tmp_path_factory.mktemp("endless")
    write_model(path, max_position_embeddings=CONTEXT)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def pair(endless, tmp_path_factory):
    """A server with two engines, for tests that leave it as they found it."""
    flags = ("--engines", 2, "--served-model-name", "tiny", "--kv-cache-bytes", "64M", "--no-prefix-caching")
    limits = ("--max-waiting", 600, "--max-sequences", 64)
    with Server(endless, *flags, *limits, log=tmp_path_factory.mktemp("pair") / "log") as running:
        yield running


@pytest.fixture
def serve(endless, tmp_path):
    """Servers with the flags that a test wants, which are gone after it."""
    servers = []

    def start(*flags, model=endless, **options):
        log = tmp_path / f"log{len(servers)}"
        servers.append(Server(model, "--kv-cache-bytes", "32M", *flags, log=log, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def asked(number, max_tokens=24, **more):
    """A request whose answer is always the same."""
    prompt = f"{number} times " + "abcdefghij"[number % 10] * (number % 7)
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | more


def client_of(server, **options):
    return httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=1000), **options)


def run(work, seconds=60):
    """A test of a server that might hang must not."""
    return asyncio.run(asyncio.wait_for(work, seconds))


async def whole(client, body):
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


class Stream:
    """A stream that is read in the background: its text so far, and how it ended: [DONE], an error, or None."""

    def __init__(self, client, body):
        self.text, self.end, self._begun = "", None, asyncio.Event()
        self.task = asyncio.ensure_future(self._read(client, body | {"stream": True}))

    async def begun(self):
        """Until there is some text."""
        waiting = asyncio.ensure_future(self._begun.wait())
        await asyncio.wait([waiting, self.task], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        assert self.text, self.task

    async def _read(self, client, body):
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                await asyncio.sleep(0)  # lines that are here already would be read without a turn for the test itself
                if not line:
                    continue
                assert self.end is None, "something came after the end"
                if line == "data: [DONE]":
                    self.end = "[DONE]"
                elif "error" in (event := json.loads(line.removeprefix("data: "))):
                    self.end = shaped(event)
                else:
                    self.text += event["choices"][0]["text"]
                    self._begun.set()


def shaped(body):
    """The error in a body, which is of OpenAI's shape."""
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"].endswith("error")
    return error


def figures(server):
    """The sums of the metrics, by name."""
    page, sums = server.client.get("/metrics").text, {}
    for name, value in re.findall(r"^(pace_\w+)(?:\{.*\})? (\S+)$", page, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def wait_until(what, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.05)
    return found


def is_idle(server):
    names = ("requests_in_flight", "requests_waiting", "sequences_running", "sequences_waiting", "cache_used_ratio")
    now = figures(server)
    return all(now[f"pace_{name}"] == 0 for name in names)


def engines_up(server, count=2):
    return lambda: list(server.client.get("/ready").json()["engines"].values()).count("up") == count


def port_is_free(server):
    """Whether another server could take its place."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", httpx.URL(server.url).port))
        return True
    return False


def node_of(server):
    return psutil.Process(server.engine(0)).ppid()


# --- 1: processes that are killed ---


def test_an_engine_is_killed_in_the_middle_of_streams(pair):
    """Its streams end with an error; what had not begun goes to the other; that one's requests never notice."""
    bodies = [asked(number) for number in range(12)]
    restarts, engine, node = figures(pair)["pace_engine_restarts_total"], pair.engine(0), node_of(pair)

    async def go():
        async with client_of(pair) as client:
            before = [await whole(client, body) for body in bodies]
            kept = await whole(client, asked(101, 3000))
            lost, other = Stream(client, asked(100, CONTEXT - 100)), None
            await lost.begun()
            other = Stream(client, asked(101, 3000))
            await other.begun()
            os.kill(engine, signal.SIGSTOP)  # so that half of what follows waits there
            wholes = [asyncio.ensure_future(whole(client, body)) for body in bodies[:6]]
            streams = [Stream(client, body) for body in bodies[6:]]
            await asyncio.sleep(0.5)
            assert not all(task.done() for task in wholes + [stream.task for stream in streams])
            os.kill(engine, signal.SIGKILL)
            assert [*await asyncio.gather(*wholes)] == before[:6]
            await asyncio.gather(lost.task, other.task, *(stream.task for stream in streams))
            assert lost.text
            assert lost.end["code"] == "engine_lost"
            assert [stream.text for stream in streams] == before[6:]
            assert [stream.end for stream in streams] == ["[DONE]"] * 6
            assert other.text == kept
            assert other.end == "[DONE]"

    run(go())
    wait_until(engines_up(pair))
    assert figures(pair)["pace_engine_restarts_total"] == restarts + 1
    assert pair.engine(0) != engine
    assert node_of(pair) == node  # forked from it: nothing was loaded
    wait_until(lambda: is_idle(pair))


def test_a_node_is_killed(pair):
    """The engines go with it, and all comes back; what had not begun is answered then."""
    engines, node = [pair.engine(0), pair.engine(1)], node_of(pair)
    bodies = [asked(number, 40) for number in range(6)]

    async def go():
        async with client_of(pair) as client:
            before = [await whole(client, body) for body in bodies]
            for engine in engines:
                os.kill(engine, signal.SIGSTOP)
            tasks = [asyncio.ensure_future(whole(client, body)) for body in bodies]
            await asyncio.sleep(0.5)
            os.kill(node, signal.SIGKILL)
            assert [*await asyncio.gather(*tasks)] == before

    run(go())
    wait_until(engines_up(pair))
    assert not any(map(alive, [*engines, node]))
    assert node_of(pair) != node
    wait_until(lambda: is_idle(pair))


@pytest.mark.parametrize("state", ["loading", "serving", "with an engine stopped"])
def test_the_front_is_killed(serve, state):
    server = serve("--engines", 2, wait=state != "loading")
    if state == "loading":
        wait_until(lambda: server.children)
    if state == "with an engine stopped":
        os.kill(server.engine(1), signal.SIGSTOP)
    children = server.children
    assert len(children) == (1 if state == "loading" else 3)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(map(alive, children)), seconds=5)
    wait_until(lambda: state == "loading" or port_is_free(server), seconds=5)


def test_an_engine_that_hangs_is_ended(serve):
    server = serve("--engines", 2, "--stall-seconds", 2)
    hung, body = server.engine(0), asked(3)
    text = server.post("/v1/completions", **body).json()["choices"][0]["text"]
    os.kill(hung, signal.SIGSTOP)
    began = time.monotonic()
    assert server.post("/v1/completions", **body).json()["choices"][0]["text"] == text
    assert 2 <= time.monotonic() - began < 8
    wait_until(engines_up(server))
    assert not alive(hung)
    assert "it has said nothing for 2 s" in server.text
    assert server.engine(1) in server.children  # who has nothing to do may be silent


def test_a_stopped_engine_goes_on_where_it_has_time(serve):
    """The watch does not take a short pause for an end."""
    server = serve("--engines", 1, "--stall-seconds", 30)
    engine = server.engine()
    os.kill(engine, signal.SIGSTOP)
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json=asked(3), timeout=2)
    os.kill(engine, signal.SIGCONT)
    assert server.post("/v1/completions", **asked(3)).status_code == 200
    wait_until(lambda: is_idle(server))
    assert server.engine() == engine


# --- 2: signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_end_before_the_server(serve, number):
    server = serve("--engines", 2, "--drain-seconds", 30, start_new_session=True)

    async def go():
        async with client_of(server) as client:
            running = Stream(client, asked(1, 3000))
            slow = asyncio.ensure_future(whole(client, asked(2, 2000)))
            await running.begun()
            os.killpg(server.process.pid, number)  # as a terminal sends it: to all that are of its session
            await asyncio.sleep(0.3)
            refused = await client.post("/v1/completions", json=asked(3))
            assert refused.status_code == 503
            assert shaped(refused.json())["code"] == "shutting_down"
            assert refused.headers["retry-after"]
            assert (await client.get("/ready")).json()["status"] == "shutting down"
            await running.task
            assert running.end == "[DONE]"
            assert len(await slow) > 100

    children = server.children
    run(go())
    assert server.process.wait(10) == 0
    assert not any(map(alive, children))
    assert port_is_free(server)
    assert "Traceback" not in server.text


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_end_is_cut_off(serve, signals):
    """After the deadline, or at a second signal."""
    server = serve("--engines", 2, "--drain-seconds", 1 if signals == 1 else 100)

    async def go():
        async with client_of(server) as client:
            running = Stream(client, asked(1, CONTEXT - 100))
            waiting = asyncio.ensure_future(client.post("/v1/completions", json=asked(2, CONTEXT - 100)))
            await running.begun()
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
            await running.task
            assert running.end != "[DONE]"
            assert running.end["code"] == "shutting_down"
            response = await waiting
            assert response.status_code == 503
            assert shaped(response.json())["code"] == "shutting_down"

    children = server.children
    run(go())
    assert server.process.wait(5) == 0
    assert not any(map(alive, children))
    assert port_is_free(server)
    assert "Traceback" not in server.text


def test_a_signal_while_the_model_is_loaded(serve):
    server = serve("--engines", 2, wait=False)
    children = wait_until(lambda: server.children)
    assert server.stop(seconds=5) == 0
    assert not any(map(alive, children))
    assert "rror" not in server.text


# --- 3: clients that go ---


async def ask_and_go(server, body, seconds):
    """Say all of a request, or the beginning of it, and close the connection without a word."""
    url, data = httpx.URL(server.url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(head.encode() + b"\r\n\r\n" + data)
    try:
        await asyncio.wait_for(reader.read(1 << 20), seconds)
        await asyncio.sleep(seconds)
    except (TimeoutError, ConnectionError):
        pass
    writer.transport.abort()


async def come_and_go(server, count, seed):
    draw, room = random.Random(seed), asyncio.Semaphore(50)

    async def one(number):
        body = asked(number, draw.choice([1, 50, 5000]), stream=draw.random() < 0.5)
        if draw.random() < 0.8:
            body["prompt"] = "a long prompt " * draw.choice([100, 500])
        if draw.random() < 0.1:
            body |= {"n": 3, "guided_regex": "[ab]{1,2000}"}
        async with room:
            await ask_and_go(server, body, draw.choice([0, 0.001, 0.01, 0.05, 0.2]))

    await asyncio.gather(*(one(number) for number in range(count)))


def held(server):
    """The memory of the front process and of each engine, in bytes, without what is there once for all."""
    pages = [psutil.Process(pid).memory_info() for pid in (server.process.pid, server.engine(0), server.engine(1))]
    return [each.rss - each.shared for each in pages]


def test_disconnects(serve):
    """Nine hundred. The requests are cancelled in the engine, and nothing is left of them."""
    server = serve("--engines", 2, "--no-prefix-caching", "--kv-cache-bytes", "8M")
    sizes = []
    for seed in range(9):
        run(come_and_go(server, 100, seed))
        wait_until(lambda: is_idle(server), 30)
        sizes.append(held(server))
    assert figures(server)["pace_requests_total"] > 500  # the others were gone before they were read
    # At first pools and the cache's pages come to be, and allocators keep some of what is freed. What is kept of each
    # request is 40 of its prompts with 7000 tokens in every round, in lists of 8 bytes a token: 2 MiB and more.
    growths = [[after - before for before, after in pairwise(each[3:])] for each in zip(*sizes, strict=True)]
    assert all(median(each) < 1.5 * MIB for each in growths), growths
    assert server.post("/v1/completions", **asked(1)).status_code == 200


# --- 4: hostile requests ---


def nested(depth, inner=1):
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


def rules(count):
    """A grammar whose rules call each other in a chain: a call each, for who goes down them."""
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(count)) + f'r{count}: "a"'


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
HOSTILE = {
    "deep body": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep metadata": json.dumps(CHAT | {"chat_template_kwargs": {"a": nested(300)}}).encode(),
    "deep tools": json.dumps(
        CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(60)}}]}
    ),
    "deep schema": asked(1, guided_json=nested(40)),
    "deep schema in a text": asked(1, guided_json="[" * 200_000),
    "huge integer": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "huge n": asked(1, n=10**15),
    "huge max_tokens": asked(1, max_tokens=2**63 - 1, guided_regex="a"),
    "max_tokens beyond 64 bits": asked(1, max_tokens=2**64),
    "huge top_k": asked(1, top_k=2**62),
    "huge seed": asked(1, seed=2**63),
    "huge token": asked(1, prompt=[2**40]),
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "top_p": -Infinity}',
    "NaN in a schema": b'{"prompt": "a", "max_tokens": 2, "guided_json": {"minimum": NaN}}',
    "huge bias": asked(1, logit_bias={"1": 1e300}),
    "lone surrogate": b'{"prompt": "a\\ud800"}',
    "lone surrogate in a name": b'{"prompt": "a", "a\\udfff": 1}',
    "lone surrogate in a model": b'{"prompt": "a", "model": "\\ud800"}',
    "lone surrogate in a choice": b'{"prompt": "a", "guided_choice": ["\\ud800"]}',
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "a", "max_tokens": 1'.encode("utf-16"),
    "empty": b"",
    "cut": b'{"prompt": "a", "max',
    "no object": b"[1, 2]",
    "null": b"null",
    "a million stops": asked(1, stop=["x"] * 1_000_000),
    "a long stop": asked(1, stop="x" * 1_000_000),
    "a million bad words": asked(1, bad_words=["x"] * 1_000_000),
    "a million stop tokens": asked(1, stop_token_ids=[1] * 1_000_000),
    "a million tokens": asked(1, prompt=[5] * 1_000_000),
    "a million prompts": asked(1, prompt=["x"] * 1_000_000),
    "schema with huge bounds": asked(1, guided_json={"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
    "schema of many items": asked(1, guided_json={"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
    "schema of long texts": asked(1, guided_json={"type": "string", "minLength": 10**9}),
    "schema without an end": asked(1, guided_json={"$ref": "#"}),
    "schema with a bomb": asked(
        1,
        guided_json={
            "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 20} for i in range(9)}
            | {"a9": {"minimum": 1}},
            "$ref": "#/$defs/a0",
        },
    ),
    "schema with many names": asked(
        1, guided_json={"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}
    ),
    "choice of many": asked(1, guided_choice=[f"c{i}" for i in range(100_000)]),
    "choice of a thousand": asked(1, guided_choice=[f"c{i}" for i in range(1000)]),
    "regex that blows up": asked(1, guided_regex="((a{1,100}){1,100}){1,100}"),
    "regex with many ways": asked(1, guided_regex="(a+)+$"),
    "regex of many states": asked(1, guided_regex="(a|b)*a(a|b){500}"),
    "regex nested": asked(1, guided_regex="(" * 30_000 + "a" + ")" * 30_000),
    "regex too long": asked(1, guided_regex="a" * 1_000_000),
    "grammar in a chain": asked(1, guided_grammar=rules(2000)),
    "grammar in a longer chain": asked(1, guided_grammar=rules(100_000)),
    "grammar nested": asked(1, guided_grammar="start: " + "(" * 10_000 + '"a"' + ")" * 10_000),
    "grammar of nothing": asked(1, guided_grammar='start: start | ""'),
    "grammar with a bomb": asked(
        1, guided_grammar="start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "a"'
    ),
    "grammar in no form": asked(1, guided_grammar="\0" * 1000),
}
MAY_BE_ANSWERED = {
    "deep tools",  # the template does not show them
    "huge max_tokens",
    "schema of many items",
    "schema of long texts",
    "schema with a bomb",
    "choice of a thousand",
    "regex that blows up",
    "regex with many ways",
    "regex of many states",
    "grammar in a chain",
    "grammar of nothing",
}


def test_hostile_requests(pair):
    """Each is refused, or answered, soon; and beside them others are answered as ever."""
    engines, fine = [pair.engine(0), pair.engine(1)], asked(5, 8)
    url = {"messages": "/v1/chat/completions"}

    async def go():
        async with client_of(pair, headers={"Content-Type": "application/json"}) as client:
            text, failures = await whole(client, fine), {}
            for name, body in HOSTILE.items():
                data = json.dumps(body) if isinstance(body, dict) else body
                path = url.get("messages" if "messages" in str(data[:40]) else "", "/v1/completions")
                began = time.monotonic()
                task = asyncio.ensure_future(client.post(path, content=data))
                if await whole(client, fine) != text:
                    failures[name] = "another text"
                response = await task
                seconds = time.monotonic() - began
                if response.status_code != 200:
                    shaped(response.json())
                wanted = (200, 400) if name in MAY_BE_ANSWERED else (400, 404)
                if response.status_code not in wanted or seconds > 8 or len(response.text) > 5000:
                    failures[name] = response.status_code, round(seconds, 2), response.text[:300]
            return failures

    assert run(go(), 120) == {}
    assert [pair.engine(0), pair.engine(1)] == engines
    wait_until(lambda: is_idle(pair))


def test_hostile_headers(pair):
    url, body = httpx.URL(pair.url), b'{"prompt": "a", "max_tokens": 1}'
    for kind in (
        "text/plain",
        "application/xml",
        "multipart/form-data",
        "application/x-www-form-urlencoded",
        "\xff",
        "",
    ):
        response = pair.client.post("/v1/completions", content=body, headers={"Content-Type": kind.encode("latin-1")})
        assert response.status_code == 400, kind
        shaped(response.json())
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nzz\r\n",
        b"GET /%ff%00%0d%0a HTTP/1.1\r\nX-Request-ID: a\x00b\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(1000),
    ):
        with socket.create_connection((url.host, url.port), timeout=10) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
            assert not answer.startswith(b"HTTP/1.1 5"), (data[:60], answer)
    assert pair.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}).is_success
    wait_until(lambda: is_idle(pair))


def drawn(server, count, mode):
    """The statuses of requests that schemathesis draws by our own description, or against it."""
    checks = schemathesis.checks
    conforms = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.response_headers_conformance,
    ]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    posts = [found.ok() for found in schema.get_all_operations() if found.ok().method == "post"]
    assert len(posts) == 5
    seen = []

    def ask(case):
        if isinstance(case.body, dict) and case.path.endswith("completions"):
            case.body.setdefault("max_tokens", 3)  # or a text goes on to the end of the context
        response = case.call(timeout=60, session=session)
        seen.append(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            shaped(response.json())
        case.validate_response(response, checks=conforms)

    with requests.Session() as session:
        for operation in posts:
            strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
            quick = settings(max_examples=count // len(posts), derandomize=True, database=None, phases=[Phase.generate])
            settings(quick, suppress_health_check=list(HealthCheck))(given(strategy)(ask))()
    return seen


@pytest.mark.parametrize("mode", ["negative", "positive"])
def test_requests_drawn_from_our_description(pair, mode):
    seen = drawn(pair, 100, mode)
    assert len(seen) >= 100
    assert (seen.count(400) > 70) if mode == "negative" else seen.count(200)
    wait_until(lambda: is_idle(pair))


@pytest.mark.slow
def test_ten_thousand_malformed_bodies(pair):
    engines = [pair.engine(0), pair.engine(1)]
    seen = drawn(pair, 10_000, "negative")
    assert len(seen) >= 10_000
    assert seen.count(400) > 8000
    assert [pair.engine(0), pair.engine(1)] == engines
    wait_until(lambda: is_idle(pair))


# --- 5: a full queue ---


@pytest.fixture
def stopped(serve):
    """A server whose one engine is stopped, so that what comes waits."""
    server = serve("--engines", 1, "--max-waiting", 2, "--max-waiting-tokens", 1000)
    server.post("/v1/completions", **asked(0))
    os.kill(server.engine(), signal.SIGSTOP)
    return server


@pytest.mark.parametrize(
    ("waiting", "more", "reason"),
    [
        ([asked(1), asked(2, n=1)], asked(3), "2 requests wait, and max_waiting is 2"),
        ([asked(1)], asked(3, n=2), "1 requests wait, and max_waiting is 2"),
        ([asked(1, prompt="a" * 3000)], asked(3, prompt="b" * 1000), "no room for 251 more"),
        ([asked(1, prompt=[5] * 700)], asked(3, prompt=[6] * 300), "no room for 301 more"),
    ],
)
def test_a_full_queue(stopped, waiting, more, reason):
    """Says so at once, and recovers."""

    async def go():
        async with client_of(stopped) as client:
            tasks = [asyncio.ensure_future(whole(client, body)) for body in waiting]
            await asyncio.sleep(0.3)
            for stream in (False, True):
                began = time.monotonic()
                refused = await client.post("/v1/completions", json=more | {"stream": stream})
                assert time.monotonic() - began < 0.5
                assert refused.status_code == 429
                assert reason in shaped(refused.json())["message"]
                assert int(refused.headers["retry-after"]) >= 1
            os.kill(stopped.engine(), signal.SIGCONT)
            await asyncio.gather(*tasks)
            assert await whole(client, asked(3))

    run(go())
    wait_until(lambda: is_idle(stopped))


def test_the_queue_is_counted_before_a_prompt_is_read(stopped):
    """A prompt that would take seconds to tokenise is refused in the time that its body takes to come."""

    async def go():
        async with client_of(stopped) as client:
            tasks = [asyncio.ensure_future(whole(client, asked(number))) for number in range(2)]
            await asyncio.sleep(0.3)
            began = time.monotonic()
            refused = await client.post("/v1/completions", json=asked(3, prompt="hello " * 2_000_000))
            assert refused.status_code == 429
            assert time.monotonic() - began < 1.5
            os.kill(stopped.engine(), signal.SIGCONT)
            await asyncio.gather(*tasks)

    run(go())


# --- 6: clients that dawdle ---


def post_of(body, path="/v1/completions"):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def long_stream(number, max_tokens):
    """2 kB for each token; the system takes some 4 MB for a client that does not read."""
    chat = {"messages": [{"role": "user", "content": f"{number}"}], "temperature": 0, "ignore_eos": True}
    return post_of(
        chat | {"max_tokens": max_tokens, "stream": True, "logprobs": True, "top_logprobs": 20}, "/v1/chat/completions"
    )


def connected(server):
    """A connection that can take next to nothing at a time."""
    url, connection = httpx.URL(server.url), socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((url.host, url.port))
    return connection


def test_a_client_that_reads_a_byte_a_second(pair):
    """The engine writes its text to the end, others are answered as fast as before, and memory does not grow."""

    def usual():
        began = time.monotonic()
        for number in range(20):
            assert pair.post("/v1/completions", **asked(number, 8)).status_code == 200
        return time.monotonic() - began

    alone, before = min(usual() for _ in range(3)), held(pair)
    with contextlib.ExitStack() as open_until_then:  # also where this fails: other tests want the server idle
        slow = [open_until_then.enter_context(connected(pair)) for _ in range(4)]
        for number, connection in enumerate(slow):
            connection.sendall(long_stream(number, 3000))
        seen, began = b"", time.monotonic()
        while figures(pair)["pace_sequences_running"] or time.monotonic() - began < 2:
            assert time.monotonic() - began < 30
            seen += slow[0].recv(1)
            time.sleep(0.2)
        assert b"HTTP/1.1 200 OK\r\n".startswith(seen[:15])
        now = figures(pair)
        assert now["pace_requests_in_flight"] == 4  # all of it is written, and waits to be read
        assert now["pace_cache_used_ratio"] == 0
        assert min(usual() for _ in range(3)) < 2 * alone + 0.2
        # 4 texts of 3000 tokens, each with 21 log-probabilities of some 20 bytes, are 5 MB; as objects they were 100.
        assert held(pair)[0] - before[0] < 48 * MIB
    wait_until(lambda: is_idle(pair))


def test_a_client_that_never_reads_is_given_up(serve):
    server = serve("--engines", 1, "--request-seconds", 5)
    slow = connected(server)
    slow.sendall(long_stream(1, 3000))
    wait_until(lambda: figures(server)["pace_requests_in_flight"] == 1)
    wait_until(lambda: not figures(server)["pace_sequences_running"])
    assert figures(server)["pace_requests_in_flight"] == 1  # the text is written, and waits to be read
    wait_until(lambda: is_idle(server), seconds=10)
    assert "was not answered within 5 s" in server.text
    assert server.stop(seconds=5) == 0  # though it still does not read
    slow.close()


def test_headers_and_bodies_without_an_end(serve):
    """They hold no place in the queue, and are given up."""
    server = serve("--engines", 1, "--request-seconds", 3, "--max-waiting", 2)
    data = post_of(asked(1))
    halves = [connected(server) for _ in range(60)]
    for number, half in enumerate(halves):
        half.sendall(data[:-5] if number % 2 else data[:30])
    began = time.monotonic()
    assert server.post("/v1/completions", **asked(2)).status_code == 200
    now = figures(server)
    assert now["pace_requests_waiting"] == now["pace_requests_in_flight"] == 0
    while time.monotonic() - began < 2:
        halves[1].sendall(b" ")  # a body that goes on is not in time for that
        time.sleep(0.5)
    for body in halves[1::2]:
        body.settimeout(10)
        assert body.recv(12) == b"HTTP/1.1 408"
    for half in halves:
        half.close()
    assert server.post("/v1/completions", **asked(2)).status_code == 200


# --- 7: a full disk ---


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_full_disk_for_the_log(endless):
    port = free_port()
    with open("/dev/full", "wb") as full:
        flags = ("--port", str(port), "--engines", "1", "--kv-cache-bytes", "16M")
        process = subprocess.Popen(
            [sys.executable, "-m", "pace", "serve", str(endless), *flags], stderr=full, stdout=full
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            wait_until(lambda: is_ready(client))
            for number in range(5):
                assert client.post("/v1/completions", json=asked(number)).status_code == 200
            engine = psutil.Process(process.pid).children(recursive=True)[-1]
            engine.kill()  # who has more to say than a request
            psutil.wait_procs([engine], 10)
            wait_until(lambda: is_ready(client))
            assert client.post("/v1/completions", json=asked(1)).status_code == 200
            (lost,) = re.findall(r"^pace_log_lines_lost_total (\S+)$", client.get("/metrics").text, re.MULTILINE)
            assert float(lost) >= 8
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()


def is_ready(client):
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


# --- 8: what can't be served ---


def broken(path):
    (path / "model.safetensors").write_bytes(b"\x10" * 1000)


def without_configuration(path):
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    ("flags", "said", "change"),
    [
        (("--port", "TAKEN"), "can't be listened on (Address already in use): choose another --port", None),
        ((), "no config.json", without_configuration),
        ((), "model.safetensors is corrupt or cut short", broken),
        (("--kv-cache-bytes", "1K"), "kv_cache_bytes is 1024; one block of this model takes", None),
        (("--kv-cache-bytes", "900T"), "give less", None),
        (("--cores", "0-9999"), "cores is '0-9999'", None),
        (("--engines", "9999"), "engines is 9999; this process may use", None),
        (("--host", "192.0.2.1"), "192.0.2.1:0 can't be listened on", None),
        (("--tls-cert", "/no/cert", "--tls-key", "/no/key"), "/no/cert with /no/key can't be used", None),
        (("--api-key-file", "/no/keys"), "/no/keys", None),
    ],
)
def test_what_cannot_be_served(endless, tmp_path, flags, said, change):
    """One line that names it, status 1, and nothing is left."""
    path = tmp_path / "model"
    shutil.copytree(endless, path)
    if change is not None:
        change(path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        flags = [port if flag == "TAKEN" else flag for flag in flags]
        command = [sys.executable, "-m", "pace", "serve", str(path), "--port", "0", *flags]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    (line,) = err.splitlines()
    assert said in line
    assert not [
        other for other in psutil.process_iter(["cmdline"]) if str(path) in " ".join(other.info["cmdline"] or [])
    ]


def test_no_such_model():
    command = [sys.executable, "-m", "pace", "serve", "/no/such/model", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("pace: no model '/no/such/model': give a path")
    assert len(done.stderr.splitlines()) == 1


# --- 9: time that is up ---


def test_a_request_that_takes_too_long(serve):
    server = serve("--engines", 1, "--request-seconds", 1)

    async def go():
        async with client_of(server) as client:
            stream = Stream(client, asked(1, CONTEXT - 100))
            response = await client.post("/v1/completions", json=asked(2, CONTEXT - 100))
            assert response.status_code == 504
            assert shaped(response.json())["code"] == "timeout"
            await stream.task
            assert stream.text
            assert stream.end["code"] == "timeout"
            assert await whole(client, asked(3, 8))

    run(go())
    wait_until(lambda: is_idle(server), 2)  # long before the texts would have ended

    async def without_an_engine():
        async with client_of(server) as client:
            os.kill(server.engine(), signal.SIGSTOP)
            for stream in (False, True):
                response = await client.post("/v1/completions", json=asked(2, stream=stream))
                assert response.status_code == 504
            os.kill(server.engine(), signal.SIGCONT)
            assert await whole(client, asked(3, 8))

    run(without_an_engine())


# --- 10: all of it at once ---


async def soak(server, seconds, seed):
    """Mixed requests, clients that go, engines that are killed: whoever is answered is answered rightly. Returns how
    many were answered, cut off, and refused.
    """
    draw, counts = random.Random(seed), {"answered": 0, "cut off": 0, "refused": 0}
    bodies = [asked(number, 1 + number * 7) for number in range(40)]
    bodies += [body | {"guided_regex": "[a-f ]{1,80}"} for body in bodies[:10]]
    until = time.monotonic() + seconds

    async def ask(client, number):
        body = bodies[number]
        if draw.random() < 0.15:
            await ask_and_go(server, body | {"stream": draw.random() < 0.5}, draw.choice([0, 0.01, 0.1]))
        elif draw.random() < 0.5:
            stream = Stream(client, body)
            await stream.task
            if stream.end == "[DONE]":
                assert stream.text == wanted[number]
                counts["answered"] += 1
            else:
                assert stream.end["code"] == "engine_lost"
                assert wanted[number].startswith(stream.text)
                counts["cut off"] += 1
        else:
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 200:
                assert response.json()["choices"][0]["text"] == wanted[number]
                counts["answered"] += 1
            else:  # it was at two engines that were killed
                assert shaped(response.json())["code"] in ("engine_lost", "no_engine")
                counts["refused"] += 1

    async def client_loop(client):
        while time.monotonic() < until:
            await ask(client, draw.randrange(len(bodies)))

    async def kill_loop():
        while time.monotonic() < until - 3:
            await asyncio.sleep(draw.uniform(1, 6))
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.engine(draw.randrange(2)), draw.choice([signal.SIGKILL, signal.SIGSEGV]))

    async with client_of(server) as client:
        wanted = [await whole(client, body) for body in bodies]
        await asyncio.gather(kill_loop(), *(client_loop(client) for _ in range(12)))
    return counts


def test_engines_that_are_killed_again_and_again(pair):
    counts = run(soak(pair, 6, seed=2), 60)
    wait_until(engines_up(pair), 30)
    wait_until(lambda: is_idle(pair), 30)
    assert counts["answered"] > 20


@pytest.mark.slow
def test_soak(pair):
    run(soak(pair, 60, seed=0), 120)
    wait_until(engines_up(pair), 60)
    wait_until(lambda: is_idle(pair), 30)
    before, restarts = held(pair)[0], figures(pair)["pace_engine_restarts_total"]
    counts = run(soak(pair, 180, seed=1), 300)
    wait_until(engines_up(pair), 60)
    wait_until(lambda: is_idle(pair), 30)
    assert counts["answered"] > 500
    assert counts["refused"] < 0.02 * counts["answered"]
    assert figures(pair)["pace_engine_restarts_total"] >= restarts + 10
    # The log of outcomes is no part of the process: what is left is what allocators keep.
    assert held(pair)[0] - before < 16 * MIB
    assert "Traceback" not in pair.text
