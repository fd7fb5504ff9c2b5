"""What the server answers: the shapes of OpenAI's API, and the numbers of LLM.generate."""

import asyncio
import json
import random

import httpx
import pytest

from pace import LLM, SamplingParams, StructuredOutputsParams

FORMS = [
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.0, "seed": 3, "n": 3},
    {"temperature": 0.7, "seed": 1, "top_p": 0.8, "top_k": 20, "min_p": 0.02},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"temperature": 0.9, "seed": 11, "logprobs": 2},
    {"stop": [" the", "."]},
    {"guided_regex": "[a-z]{3,9}( [a-z]{1,5}){0,3}"},
    {"logit_bias": {"100": 5.0}, "temperature": 0.5, "seed": 2**40},
]


def requests(count):
    """Mixed: lengths, forms, streamed or not, prompts that begin alike."""
    draw = random.Random(5)
    shared = "".join(chr(draw.randrange(97, 123)) for _ in range(150))
    for number in range(count):
        own = "".join(chr(draw.randrange(97, 123)) for _ in range(draw.choice([3, 40, 120])))
        prompt = shared[: draw.choice([0, 70, 150])] + own
        body = {"prompt": prompt, "max_tokens": draw.choice([1, 8, 24])}
        yield body | {"temperature": 0} | FORMS[number % len(FORMS)] | {"stream": draw.random() < 0.5}


def params_of(body):
    named = {name: value for name, value in body.items() if name not in ("prompt", "stream", "guided_regex")}
    if "logit_bias" in named:
        named["logit_bias"] = {int(token): value for token, value in named["logit_bias"].items()}
    if "guided_regex" in body:
        named["structured_outputs"] = StructuredOutputsParams(regex=body["guided_regex"])
    return SamplingParams(**named)


async def ask(client, body):
    """Of each text: what it says, how it ended, and its log-probabilities."""
    if not body["stream"]:
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        return [(c["text"], c["finish_reason"], (c["logprobs"] or {}).get("token_logprobs")) for c in choices]
    texts = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text, _, logprobs = texts.get(choice["index"], ("", None, None))
                if choice["logprobs"] is not None:
                    logprobs = (logprobs or []) + choice["logprobs"]["token_logprobs"]
                texts[choice["index"]] = text + choice["text"], choice["finish_reason"], logprobs
    return [texts[index] for index in sorted(texts)]


def expected(output):
    for text in output.outputs:
        of_token = None
        if text.logprobs is not None:
            of_token = [row[token].logprob for token, row in zip(text.token_ids, text.logprobs, strict=True)]
        yield text.text, text.finish_reason, of_token


@pytest.mark.parametrize("engines", [1, 2])
def test_answers_are_those_of_generate(tiny, server, engines, tmp_path):
    """64 at once, each twice in a row."""
    bodies = list(requests(64))
    llm = LLM(tiny, kv_cache_bytes=8 << 20)
    outputs = llm.generate([body["prompt"] for body in bodies], [params_of(body) for body in bodies])
    wanted = [list(expected(output)) for output in outputs]

    async def all_at_once(url):
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            for _ in range(2):
                assert await asyncio.gather(*(ask(client, body) for body in bodies)) == wanted

    if engines == 2:
        asyncio.run(all_at_once(server.url))
        return
    from .running import Server

    with Server(tiny, "--engines", 1, "--kv-cache-bytes", "2M", log=tmp_path / "log") as one:
        asyncio.run(all_at_once(one.url))
