"""What HTTP costs: streams through `pace serve` beside the same requests given to the bare engine.

`python -m benchmarks.serving.overhead [MODEL]`. Both have the same engine on the same cores, with as many requests in
flight; the front process and the client have the other cores, as they do on a server. The two take turns, and the
shares are those of turns side by side.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from pace.numa import allowed, topology
from pace.sysfs import format_cpu_list, parse_cpu_list

from .client import Client
from .figures import outcome_of
from .load import closed_loop

CACHE_BYTES = 512 << 20

BARE = """
import json, sys, time
from pace import SamplingParams
from pace.engine.loader import load_shared
from pace.numa import allowed, occupy, topology
from pace.partition import partition
(place,) = partition(topology(), allowed(), cores=sys.argv[2])
occupy(place)
engine = load_shared(sys.argv[1]).engine(int(sys.argv[3]), prefix_caching=True)
for line in sys.stdin:
    asked = json.loads(line)
    params = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
    waiting = [engine.intake.request(prompt, params) for prompt in asked["prompts"]]
    began, written, running = time.perf_counter(), 0, 0
    while waiting or running:
        while waiting and running < asked["streams"]:
            engine.add(waiting.pop())
            running += 1
        for request in engine.step():
            if request.finished:
                running -= 1
                written += request.num_output_tokens
    print(written / (time.perf_counter() - began), flush=True)
"""


def prompts(count: int, length: int, rng: np.random.Generator) -> list[list[int]]:
    return rng.integers(100, 40_000, (count, length)).tolist()  # type: ignore[no-any-return]


@contextmanager
def bare_engine(model: str, cores: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", BARE, model, cores, str(CACHE_BYTES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def server(model: str, cores: str) -> Iterator[str]:
    """Its address."""
    with tempfile.NamedTemporaryFile("w+") as log:
        command = [sys.executable, "-m", "pace", "serve", model, "--port", "0", "--cores", cores]
        process = subprocess.Popen([*command, "--kv-cache-bytes", str(CACHE_BYTES)], stderr=log)
        try:
            while not (found := re.search(r" on (http://\S+) with", Path(log.name).read_text())):
                if process.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()
            process.wait()


def rate_bare(process: subprocess.Popen[str], asked: list[list[int]], streams: int, tokens: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"prompts": asked, "streams": streams, "tokens": tokens}) + "\n")
    process.stdin.flush()
    return float(_answer(process.stdout))


def _answer(lines: IO[str]) -> str:
    return next(islice(lines, 1))


def rate_served(url: str, model: str, asked: list[list[int]], streams: int, tokens: int) -> float:
    client = Client(url)
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    messages = [
        client.message("POST", "/v1/completions", json.dumps(body | {"prompt": prompt}).encode()) for prompt in asked
    ]
    began = time.perf_counter()
    exchanges = asyncio.run(closed_loop(client, messages, streams, 3600, 600))
    seconds = time.perf_counter() - began
    outcomes = [outcome_of(exchange, tokens) for exchange in exchanges]
    assert all(outcome.error is None for outcome in outcomes), next(o.error for o in outcomes if o.error)
    assert sum(outcome.output_tokens for outcome in outcomes) == tokens * len(asked)
    return tokens * len(asked) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--cores", help="the engine's; the front process and the client have the others")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    mine = sorted(allowed().cpus & {cpu.id for cpu in topology().cpus})
    cores = options.cores or format_cpu_list(mine[:-1] or mine)
    others = set(mine) - set(parse_cpu_list(cores)) or set(mine)
    rng, shares = np.random.default_rng(0), []
    with bare_engine(options.model, cores) as bare, server(options.model, cores) as url:
        os.sched_setaffinity(0, others)
        sizes = options.streams, options.output_tokens
        for round_ in range(-1, options.rounds):
            asked = prompts(options.streams, options.prompt_tokens, rng)
            alone = rate_bare(bare, asked, *sizes)
            served = rate_served(url, options.model, asked, *sizes)
            if round_ < 0:  # to warm up
                continue
            shares.append(served / alone)
            print(f"{options.streams} streams: engine {alone:7.1f} tok/s, served {served:7.1f}: {shares[-1]:.1%}")
    print(f"of the bare engine's throughput, through HTTP: {statistics.median(shares):.1%} (median)")


if __name__ == "__main__":
    main()
