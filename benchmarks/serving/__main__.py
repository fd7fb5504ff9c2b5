"""Latency and throughput of any OpenAI-compatible server under load: `python -m benchmarks.serving --url URL`.

Requests come at given rates whatever the server does (`--rates 1,2,4,inf`: open loop, Poisson), or a given number of
users send one after the other (`--concurrencies 1,8,32`: closed loop). Answers are streamed; tokens are counted by the
server itself. `--compare A.json B.json` shows earlier runs beside each other, and with `--plot` draws them together.
"""

import argparse
import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .client import Client, Reply
from .figures import Objective, Point, outcome_of, summary
from .load import closed_loop, counted_cost, exchange, open_loop, until_ready
from .report import compare, level, render
from .results import Run
from .stream import body_reads, head_of
from .workload import Ask, Measure, Span, arrivals, asks_of_file, drawn_asks, text_of

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
PROBE_WORDS = (32, 160)


@dataclass(frozen=True)
class Server:
    """Whom to ask, and in which form."""

    client: Client
    model: str
    endpoint: str
    ignore_eos: bool
    temperature: float
    extra: dict[str, Any]  # fields of the body

    def message(self, ask: Ask, stream: bool = True) -> bytes:
        body: dict[str, Any] = {"model": self.model, "max_tokens": ask.output_tokens, "temperature": self.temperature}
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            body["prompt"] = ask.prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return self.client.message("POST", PATHS[self.endpoint], json.dumps(body | self.extra).encode())


def said(reply: Reply) -> dict[str, Any]:
    """The JSON of an answer that was not streamed."""
    head = head_of(reply.raw)
    if head is None:
        raise SystemExit("the server closed the connection without an answer")
    body = b"".join(data for _, data in body_reads(reply.reads, head))
    if head.status != 200:
        raise SystemExit(f"the server says HTTP {head.status}: {body.decode(errors='replace')[:500]}")
    return dict(json.loads(body))


async def is_ready(client: Client) -> bool:
    try:
        reply = await client.exchange(client.message("GET", "/v1/models"))
    except OSError:
        return False
    head = head_of(reply.raw)
    return head is not None and head.status != 503


async def measured(server: Server) -> Measure:
    """How long a prompt of words is, asked of the server's own tokenizer."""
    counts = []
    for words in PROBE_WORDS:
        ask = Ask(text_of(words, np.random.default_rng(words), np.random.default_rng()), 1)
        usage = said(await server.client.exchange(server.message(ask, stream=False))).get("usage")
        if not usage:
            return Measure()
        counts.append((words, int(usage["prompt_tokens"])))
    return Measure.of(*counts)


async def measure(server: Server, kind: str, at: float, asks: Sequence[Ask], options: argparse.Namespace) -> Point:
    """The answers are read when the last one is there."""
    messages = [server.message(ask) for ask in asks]
    with counted_cost() as cost:
        if kind == "rate":
            count = int(min(len(asks), 1 + at * options.seconds))
            due = arrivals(at, count, options.seed, options.arrivals == "poisson")
            exchanges = await open_loop(server.client, messages[:count], due, options.timeout_s)
        else:
            exchanges = await closed_loop(server.client, messages, int(at), options.seconds, options.timeout_s)
    outcomes = [outcome_of(each, asks[each.asked].output_tokens) for each in exchanges]
    return summary(kind, at, outcomes, objective_of(options), cost.seconds)


async def warm_up(server: Server, asks: Sequence[Ask], timeout_s: float) -> None:
    """All at once. What does not work here would not work later."""
    sent = (exchange(server.client, i, server.message(ask), 0.0, timeout_s) for i, ask in enumerate(asks))
    outcomes = [outcome_of(each, 0) for each in await asyncio.gather(*sent)]
    if outcomes and all(each.error for each in outcomes):
        raise SystemExit(f"no request is answered while warming up: {outcomes[0].error}")


def maker_of(measure_of: Measure, options: argparse.Namespace) -> Callable[[int], list[Ask]]:
    """So many requests, the same ones each time; see workload.py."""
    if options.prompts:
        return lambda count: asks_of_file(options.prompts, count, options.output_tokens, options.seed)
    return lambda count: drawn_asks(count, options.prompt_tokens, options.output_tokens, measure_of, options.seed)


async def sweep(options: argparse.Namespace, console: Console) -> Run:
    client = Client(options.url, options.api_key)
    if not await until_ready(lambda: is_ready(client), options.wait_s):
        raise SystemExit(f"no server answers at {options.url}")
    model = options.model or said(await client.exchange(client.message("GET", "/v1/models")))["data"][0]["id"]
    server = Server(client, model, options.endpoint, options.ignore_eos, options.temperature, options.body)
    make = maker_of(Measure() if options.prompts else await measured(server), options)
    loads = [("concurrency", users) for users in options.concurrencies]
    loads += [("rate", rate) for rate in options.rates]
    points = []
    for kind, at in loads:
        await warm_up(server, make(options.warm_up), options.timeout_s)
        point = await measure(server, kind, at, make(options.requests), options)
        console.print(f"{level(point)}: {point.requests} requests in {point.seconds:.1f} s", style="dim")
        points.append(point)
    client.close()
    return Run(options.name or model, model, settings_of(options), tuple(points))


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on and a reader of the file cannot see in them."""
    lengths = {"prompts": options.prompts.name} if options.prompts else {"prompt_tokens": str(options.prompt_tokens)}
    return {
        **lengths,
        "output_tokens": str(options.output_tokens),
        "endpoint": options.endpoint,
        "arrivals": options.arrivals if options.rates else None,
        "slo_ttft_ms": options.slo_ttft_ms,
        "slo_tpot_ms": options.slo_tpot_ms,
        "seed": options.seed,
        "body": options.body,
    }


def objective_of(options: argparse.Namespace) -> Objective | None:
    if options.slo_ttft_ms is None and options.slo_tpot_ms is None:
        return None
    limits = (math.inf if limit is None else limit / 1e3 for limit in (options.slo_ttft_ms, options.slo_tpot_ms))
    return Objective(*limits)


def levels(text: str) -> list[float]:
    return _positive([float(each) for each in text.split(",")])


def whole_levels(text: str) -> list[float]:
    return _positive([float(int(each)) for each in text.split(",")])


def _positive(found: list[float]) -> list[float]:
    if not all(each > 0 for each in found):
        raise ValueError(f"the levels are {found}; they must be above 0")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument_group("server").add_argument
    add("--url", help="such as http://127.0.0.1:8000")
    add("--model", help="the first that the server names, if left out")
    add("--api-key")
    add("--endpoint", choices=PATHS, default="completions")
    add("--body", type=json.loads, default={}, metavar="JSON", help="more fields for each request")
    add("--temperature", type=float, default=0.0)
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="outputs as long as asked")
    add("--wait-s", type=float, default=0.0, help="for the server to come up")
    add("--timeout-s", type=float, default=600.0, help="of a request")
    add = made.add_argument_group("load").add_argument
    add("--rates", type=levels, default=[], metavar="R,R,…", help="requests a second, inf for all at once")
    add("--arrivals", choices=("poisson", "constant"), default="poisson")
    add("--concurrencies", type=whole_levels, default=[], metavar="N,N,…", help="requests at a time")
    add("--requests", type=int, default=64, help="for each load")
    add("--seconds", type=float, default=math.inf, help="after which no request of a load begins")
    add("--warm-up", type=int, default=2, help="requests before each load that do not count")
    add("--prompt-tokens", type=Span.parse, default=Span(128, 128), metavar="N[:M]")
    add("--output-tokens", type=Span.parse, default=Span(64, 64), metavar="N[:M]")
    add("--prompts", type=Path, metavar="FILE", help="a text or a JSON object a line, instead of words without sense")
    add("--seed", type=int, default=0, help="of lengths and arrivals")
    add = made.add_argument_group("results").add_argument
    add("--slo-ttft-ms", type=float, help="goodput counts requests that keep to this")
    add("--slo-tpot-ms", type=float, help="and to this")
    add("--name", help="of the server, for tables and plots")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE.png", help="with matplotlib")
    add("--compare", type=Path, nargs="+", metavar="FILE", help="show these instead of measuring")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    console = Console(width=136, highlight=False)
    if options.compare:
        runs = [Run.read(path) for path in options.compare]
        console.print(compare(runs))
    else:
        if not options.url:
            parser().error("--url says where the server is")
        if not (options.rates or options.concurrencies):
            options.concurrencies = [1.0, 8.0, 32.0]
        runs = [asyncio.run(sweep(options, console))]
        console.print(render(runs[0]))
        if options.json:
            runs[0].write(options.json)
    if options.plot:
        from .plot import draw

        draw(runs, options.plot)


if __name__ == "__main__":
    main()
