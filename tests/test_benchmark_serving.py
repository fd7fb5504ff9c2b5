"""benchmarks.serving against a server that answers by a script, and its arithmetic alone."""

import asyncio
import io
import json
import math
import time
from contextlib import asynccontextmanager

import numpy as np
import pytest
from rich.console import Console

from benchmarks.serving.__main__ import main
from benchmarks.serving.client import Client, Reply
from benchmarks.serving.figures import Objective, Outcome, Percentiles, outcome_of, summary
from benchmarks.serving.load import Exchange, closed_loop, open_loop
from benchmarks.serving.report import compare, render
from benchmarks.serving.results import Run
from benchmarks.serving.stream import Chunks, answer_of, body_reads, head_of
from benchmarks.serving.workload import Measure, Span, arrivals, asks_of_file, drawn_asks

LATE_S = 0.035  # by which a busy machine may wake either side of a test too late
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece, finish=None):
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish}], usage=None)


def usage(prompt, output):
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output})


END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Script:
    """What the server does with each request, in order; the last is repeated. Each is given the body and yields bytes
    to send and seconds to wait. An answer that ends with None closes the connection.
    """

    def __init__(self, *answers):
        self.answers, self.bodies, self.connections = answers, [], 0

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(next(line for line in head.split(b"\r\n") if b"Content-Length" in line).split(b":")[1])
                body = json.loads(await reader.readexactly(size) or b"{}")
                self.bodies.append(body)
                answer = self.answers[min(len(self.bodies), len(self.answers)) - 1]
                async for part in _all(answer(body)):
                    if part is None:
                        return
                    if isinstance(part, bytes):
                        writer.write(part)
                    else:
                        await asyncio.sleep(part)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def _all(parts):
    if hasattr(parts, "__aiter__"):
        async for part in parts:
            yield part
    else:
        for part in parts:
            yield part


@asynccontextmanager
async def serving(script):
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    try:
        yield client
    finally:
        client.close()
        server.close()


def answer(first_s=0.0, gap_s=0.0, tokens=4):
    """A text of so many tokens, one an event, as completions are streamed."""

    def parts(_):
        yield HEAD
        yield first_s
        for i in range(tokens):
            if i:
                yield gap_s
            yield chunk(text("a", "length" if i == tokens - 1 else None))
        yield chunk(usage(7, tokens)) + END

    return parts


def whole(status, fields):
    data = json.dumps(fields).encode()

    def parts(_):
        yield b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data)

    return parts


def asked(client, count, tokens=4):
    return [client.message("POST", "/v1/completions", json.dumps({"max_tokens": tokens}).encode())] * count


def outcomes_of(script, count, *, concurrency=1, offsets=None, tokens=4, timeout_s=5.0):
    async def run():
        async with serving(script) as client:
            messages = asked(client, count, tokens)
            if offsets is not None:
                return await open_loop(client, messages, offsets, timeout_s)
            return await closed_loop(client, messages, concurrency, math.inf, timeout_s)

    return [outcome_of(each, tokens) for each in asyncio.run(run())]


# --- a stream, read ---


def test_chunks_come_apart_wherever_the_reads_cut_them():
    raw = chunk(b"data: one\n") + chunk(b"\r\n0\r\n\r\n") + b"1;name=value\r\nx\r\n" + b"0\r\n\r\n"
    for cut in range(len(raw)):
        chunks = Chunks()
        assert chunks.feed(raw[:cut]) + chunks.feed(raw[cut:]) == b"data: one\n\r\n0\r\n\r\nx"
    chunks = Chunks()
    assert b"".join(chunks.feed(raw[i : i + 1]) for i in range(len(raw))) == b"data: one\n\r\n0\r\n\r\nx"


def test_an_event_counts_when_its_line_is_whole():
    pieces = [text("a")[:20], text("a")[20:] + text("b")[:-2], b"\n\n", text("", "stop") + usage(3, 2)]
    raw = [HEAD + chunk(pieces[0]), *map(chunk, pieces[1:])]
    found = answer_of(body_reads([(float(at), each) for at, each in enumerate(raw)], head_of(HEAD)))
    assert found.text_times == (1.0, 2.0)
    assert (found.end, found.prompt_tokens, found.output_tokens, found.error) == (3.0, 3, 2, None)


def test_a_role_is_no_text_and_what_is_said_may_look_like_an_event():
    role = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    reads = [
        (1.0, b": ping\r\n\r\n" + role),
        (2.0, event(choices=[{"delta": {"reasoning_content": "hm"}}])),
        (3.0, event(choices=[{"delta": {"content": "\n\ndata: x\n\n"}}])),
        (4.0, event(choices=[{"delta": {}, "finish_reason": "stop"}]) + b"data: [DONE]\r\n\r\n"),
    ]
    found = answer_of(reads)
    assert found.text_times == (2.0, 3.0)
    assert found.end == 4.0
    assert found.output_tokens is None


def test_a_head():
    head = head_of(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\nConnection: Close\r\n\r\nno")
    assert (head.status, head.chunked, head.body_bytes, head.keeps_alive) == (429, False, 2, False)
    assert head_of(b"HTTP/1.1 200 OK\r\n") is None


# --- arithmetic ---


def replied(*reads, due=10.0, sent=10.5):
    raw = [(reads[0][0], HEAD + chunk(reads[0][1])), *((at, chunk(data)) for at, data in reads[1:])]
    return Exchange(0, due, sent, Reply(raw, complete=True))


def test_the_times_of_a_request():
    found = outcome_of(
        replied((11, text("a")), (13, text("b")), (14, text("c") + text("", "length")), (20, usage(5, 4))), 4
    )
    assert found.lag == 0.5
    assert found.ttft == 1
    assert found.gaps == (2, 1)
    assert found.e2e == 4
    assert found.tpot == pytest.approx(3 / 3)  # of the 4 tokens that the server counts, not of the 3 events
    assert (found.prompt_tokens, found.output_tokens, found.error) == (5, 4, None)


def test_one_token_has_no_time_per_token():
    found = outcome_of(replied((11, text("a", "length")), (12, usage(5, 1))), 1)
    assert found.tpot is None
    assert math.isnan(summary("rate", 1, [found]).tpot.p50)


def test_without_usage_events_are_taken_for_tokens():
    found = outcome_of(replied((11, text("a")), (12, text("b", "length"))), 2)
    assert (found.output_tokens, found.counted) == (2, False)


def test_percentiles():
    found = Percentiles.of(float(i) for i in range(101))
    assert (found.p50, found.p90, found.p99) == (50, 90, 99)
    assert math.isnan(Percentiles.of([]).p99)


def outcome(ttft, tpot, due=0.0, error=None, tokens=11):
    return Outcome(due, due + ttft + tpot * (tokens - 1), ttft=ttft, output_tokens=tokens, asked_tokens=11, error=error)


def test_a_summary_counts_what_was_answered_and_what_was_good():
    outcomes = [
        outcome(1.0, 0.1),
        outcome(3.0, 0.1, due=1),
        outcome(1.0, 0.6, due=3.0),
        outcome(0.1, 0.01, error="HTTP 429"),
        outcome(0.1, 0.01, error="cut short"),
    ]
    point = summary("concurrency", 3, outcomes, Objective(ttft=2.0, tpot=0.5))
    assert point.seconds == 10
    assert (point.requests, point.answered, point.refused, point.other_errors) == (5, 3, 1, 1)
    assert point.output_rate == 3.3
    assert point.request_rate == 0.3
    assert point.goodput == 0.1
    assert point.ttft.p50 == 1.0
    assert summary("rate", 1, outcomes, Objective(tpot=0.5)).good == 2
    assert summary("rate", 1, outcomes).goodput is None


# --- against a server ---


def test_times_are_those_of_the_server():
    found = outcomes_of(Script(answer(0.08, 0.03, 5)), 3, tokens=5)
    for each in found:
        assert each.error is None
        assert 0.08 <= each.ttft < 0.08 + LATE_S
        assert 0.03 <= each.tpot < 0.03 + LATE_S
        assert 0.2 <= each.e2e < 0.2 + 5 * LATE_S
        assert len(each.gaps) == 4
        assert (each.prompt_tokens, each.output_tokens) == (7, 5)


def test_at_a_concurrency_no_more_are_on_their_way():
    now, most = 0, 0

    async def counting(_):
        nonlocal now, most
        now += 1
        most = max(most, now)
        for part in answer(0.01)(_):
            yield part
            await asyncio.sleep(0)
            if isinstance(part, bytes) and part.endswith(b"0\r\n\r\n"):
                now -= 1

    script = Script(counting)
    found = outcomes_of(script, 12, concurrency=3)
    assert [each.error for each in found] == [None] * 12
    assert most == 3
    assert script.connections == 3


def test_waiting_for_a_server_that_falls_behind_is_latency():
    lock = asyncio.Lock()

    async def one_at_a_time(body):
        async with lock:
            for part in answer(0.04)(body):
                if not isinstance(part, float):
                    yield part
                else:
                    await asyncio.sleep(part)

    open_ = outcomes_of(Script(one_at_a_time), 10, offsets=arrivals(100, 10, seed=0, poisson=False))
    assert max(each.ttft for each in open_) > 10 * 0.04 - 9 / 100 - 0.001
    lock = asyncio.Lock()
    closed = outcomes_of(Script(one_at_a_time), 10, concurrency=1)
    assert max(each.ttft for each in closed) < 0.04 + LATE_S


def test_a_client_that_is_late_hides_nothing():
    async def run():
        async with serving(Script(answer())) as client:
            loop = asyncio.get_running_loop()
            loop.call_later(0.02, time.sleep, 0.1)  # nothing can be sent meanwhile
            return await open_loop(client, asked(client, 4), [0.0, 0.03, 0.04, 0.05], 5.0)

    found = [outcome_of(each, 4) for each in asyncio.run(run())]
    for each, due in zip(found[1:], (0.03, 0.04, 0.05), strict=True):
        assert each.lag >= 0.119 - due
        assert each.ttft >= each.lag


def cut(_):
    yield HEAD + chunk(text("a"))
    yield 0.01
    yield None


def fails_inside(_):
    yield HEAD + chunk(text("a")) + chunk(event(error={"message": "no"})) + END


def says_nothing(_):
    yield None


@pytest.mark.parametrize(
    ("does", "error"),
    [
        (whole(b"429 Too Many Requests", {"error": {}}), "HTTP 429"),
        (whole(b"500 Internal Server Error", {"error": {}}), "HTTP 500"),
        (whole(b"200 OK", {"choices": [{"text": "not streamed"}]}), "cut short"),
        (cut, "cut short"),
        (fails_inside, "error in the stream"),
        (says_nothing, "connection lost"),
        (lambda _: [HEAD, 10.0], "timeout"),
        (lambda _: [HEAD + chunk(b"data: {\n\n") + END], "not a stream of events"),
    ],
)
def test_errors_are_told_apart_and_the_rest_goes_on(does, error):
    found = outcomes_of(Script(does, answer()), 3, timeout_s=0.3)
    assert [each.error for each in found] == [error, None, None]
    assert found[0].end >= found[0].due


def test_no_connection():
    async def run():
        server = await asyncio.start_server(Script().serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return await open_loop(client := Client(f"127.0.0.1:{port}"), asked(client, 2), [0, 0], 5.0)

    assert [outcome_of(each, 4).error for each in asyncio.run(run())] == ["no connection"] * 2


def test_a_connection_that_the_server_closed_meanwhile_is_opened_again():
    def then_closes(body):
        yield from answer()(body)
        yield 0.03
        yield None

    async def run():
        async with serving(script) as client:
            return await open_loop(client, asked(client, 3), [0, 0.02, 0.2], 5.0)

    script = Script(then_closes)
    assert [outcome_of(each, 4).error for each in asyncio.run(run())] == [None] * 3
    assert script.connections >= 2


def test_an_answer_that_the_end_of_the_connection_ends():
    def until_close(_):
        yield b"HTTP/1.0 200 OK\r\n\r\n" + text("a") + text("b", "length") + usage(1, 2)
        yield None

    (found,) = outcomes_of(Script(until_close), 1, tokens=2)
    assert (found.error, found.output_tokens) == (None, 2)


# --- what is asked ---


def test_arrivals():
    assert arrivals(math.inf, 3, seed=0) == [0, 0, 0]
    assert arrivals(4, 3, seed=0, poisson=False) == [0, 0.25, 0.5]
    drawn = arrivals(4, 4000, seed=1)
    assert drawn == arrivals(4, 4000, seed=1) != arrivals(4, 4000, seed=2)
    gaps = np.diff(drawn)
    assert np.mean(gaps) == pytest.approx(0.25)
    assert np.std(gaps) == pytest.approx(0.25, rel=0.1)


def test_asks_have_the_lengths_of_their_seed_and_words_of_their_own():
    one, other = (drawn_asks(50, Span(20, 40), Span(3, 9), Measure(2.0, 4.0), seed=5) for _ in range(2))
    assert [ask.output_tokens for ask in one] == [ask.output_tokens for ask in other]
    words = [len(ask.prompt.split()) for ask in one]
    assert words == [len(ask.prompt.split()) for ask in other]
    assert (min(words), max(words)) == (8, 18)
    assert {ask.output_tokens for ask in one} == set(range(3, 10))
    openings = [" ".join(ask.prompt.split()[:4]) for ask in one + other]
    assert len(set(openings)) == 100


def test_the_measure_of_a_prompt():
    measure = Measure.of((32, 42), (160, 234))
    assert (measure.per_word, measure.around) == (1.5, -6)
    assert measure.words(144) == 100


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('one\n\n{"prompt": "two\\nlines", "output_tokens": 5}\n{"prompt": "three"}\n')
    found = asks_of_file(file, 4, Span(8, 8), seed=0)
    assert [(ask.prompt, ask.output_tokens) for ask in found] == [
        ("one", 8),
        ("two\nlines", 5),
        ("three", 8),
        ("one", 8),
    ]


@pytest.mark.parametrize("wrong", ["0", "8:4", "a"])
def test_lengths_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        Span.parse(wrong)


# --- the whole ---


class Model:
    """Answers as asked: names itself, counts words for tokens, and stops after `longest` tokens."""

    def __init__(self, longest=100):
        self.script = Script(self.answer)
        self.longest = longest

    def answer(self, body):
        if not body:
            return whole(b"200 OK", {"data": [{"id": "parrot"}]})(body)
        if not body.get("stream"):
            words = len((body.get("prompt") or body["messages"][0]["content"]).split())
            return whole(b"200 OK", {"usage": {"prompt_tokens": words + 2, "completion_tokens": 1}})(body)
        return answer(0.001, 0.001, min(body["max_tokens"], self.longest))(body)


def ran(model, *arguments):
    """main() in another thread than the server's."""

    async def run():
        server = await asyncio.start_server(model.script.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.to_thread(main, ["--url", url, *arguments])
        server.close()

    asyncio.run(run())


def test_a_sweep(tmp_path, capsys):
    file, model = tmp_path / "run.json", Model()
    load = "--concurrencies 1,2 --rates 100,inf --requests 6 --prompt-tokens 10:20 --output-tokens 3 --slo-ttft-ms 1000"
    ran(model, *load.split(), "--json", str(file), "--endpoint", "chat", "--body", '{"top_k": 1}')
    printed = capsys.readouterr().out
    assert "parrot" in printed
    assert "∞ req/s" in printed
    run = Run.read(file)
    assert [(point.kind, point.level) for point in run.points] == [
        ("concurrency", 1),
        ("concurrency", 2),
        ("rate", 100),
        ("rate", math.inf),
    ]
    for point in run.points:
        assert (point.answered, point.output_tokens, point.asked_tokens, point.good) == (6, 18, 18, 6)
        assert point.errors == {}
    last = model.script.bodies[-1]
    assert (last["model"], last["max_tokens"], last["ignore_eos"], last["top_k"]) == ("parrot", 3, True, 1)
    assert last["stream_options"] == {"include_usage": True}
    assert 8 <= len(last["messages"][0]["content"].split()) <= 18  # the model counts two more

    main(["--compare", str(file), str(file)])
    assert "×1.00" in capsys.readouterr().out


def test_outputs_that_are_shorter_than_asked_are_remarked_on(capsys):
    ran(Model(longest=2), *"--concurrencies 1 --requests 2 --output-tokens 3".split())
    assert "4 tokens of output where 6 were asked for" in capsys.readouterr().out


def test_nothing_is_measured_where_nothing_is_answered():
    model, named = Model(), whole(b"200 OK", {"data": [{"id": "parrot"}]})
    model.script.answers = (named, named, whole(b"400 Bad Request", {"error": "no completions here"}))
    with pytest.raises(SystemExit, match="no completions here"):
        ran(model, *"--concurrencies 1 --requests 2".split())


def some_run(name="one", errors=()):
    outcomes = [outcome(0.1 * i + 0.1, 0.02, due=i) for i in range(4)]
    outcomes += [outcome(0.1, 0.02, error=error) for error in errors]
    points = [summary(kind, level, outcomes) for kind in ("concurrency", "rate") for level in (1.0, 8.0)]
    points.append(summary("rate", math.inf, [outcome(0.1, 0, error="HTTP 429")]))
    return Run(name, "parrot", {"prompt_tokens": "128", "output_tokens": "64", "body": {}}, tuple(points))


def printed(shown):
    console = Console(width=136, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def test_errors_are_shown_and_429s_by_themselves():
    shown = printed(render(some_run(errors=["HTTP 429", "HTTP 429", "timeout"])))
    assert "+2 429 +1 errors" in shown
    assert "2 × HTTP 429, 1 × timeout" in shown
    assert "–" in shown  # percentiles of nothing


def test_runs_are_kept_whole(tmp_path):
    run = some_run()
    run.write(tmp_path / "run.json")
    json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    again = Run.read(tmp_path / "run.json")
    assert str(again) == str(run)


def test_a_comparison_is_to_the_first():
    slower = [outcome(0.2 * i + 0.2, 0.04, due=i) for i in range(4)]
    other = Run("other", "parrot", some_run().settings, (summary("concurrency", 1.0, slower),))
    shown = printed(compare([some_run(), other]))
    assert "×2.00" in shown
    assert "not all were asked the same" not in shown
    another = Run("another", "crow", some_run().settings, other.points)
    assert "not all were asked the same" in printed(compare([some_run(), another]))


@pytest.mark.parametrize("count", [1, 3])
def test_plots(tmp_path, count):
    pytest.importorskip("matplotlib")
    from benchmarks.serving.plot import draw

    draw([some_run(str(i)) for i in range(count)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
