"""The clients that people have, each as its users use it, against a running server."""

import asyncio
import inspect
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from .running import Server

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or litellm would fetch prices when it is imported

NODE_OPENAI = "openai@6.49.0"
ASK = [{"role": "user", "content": "What is the capital of France?"}]
COUNT = "One, two, three,"
GREEDY = {"temperature": 0, "max_tokens": 24}
FORMED = {"temperature": 0, "max_tokens": 99}


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=0, le=40)


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather", "parameters": Weather.model_json_schema()},
}
NAMED = {"type": "function", "function": {"name": "weather"}}
CALLS = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
OTHER = {"type": "function", "function": {"name": "news", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def locked(tiny, tmp_path_factory):
    """Wants a key, and has room for one request."""
    log = tmp_path_factory.mktemp("log") / "locked.log"
    flags = ("--api-key", "open", "--max-waiting", 1, "--served-model-name", "tiny", "--kv-cache-bytes", "1M")
    with Server(tiny, *flags, "--engines", 1, log=log) as running:
        running.client.headers["Authorization"] = "Bearer open"
        yield running


def base(server):
    return f"{server.url}/v1"


def settings(server, key="none"):
    return {"base_url": base(server), "api_key": key}


# --- openai, in both of its forms ---


class Asking:
    """Lets one test speak to both: what is to be awaited is, and streams are lists."""

    def __init__(self, kind):
        self._kind, self._runner = kind, asyncio.Runner()

    def client(self, server, key="none"):
        return self._kind(**settings(server, key), max_retries=0)

    def get(self, value):
        if not inspect.isawaitable(value):
            return value

        async def awaited():
            return await value

        return self._runner.run(awaited())

    def all(self, value):
        async def listed(items):
            return [item async for item in items]

        items = self.get(value)
        return self._runner.run(listed(items)) if hasattr(items, "__aiter__") else list(items)


@pytest.fixture(params=[openai.OpenAI, openai.AsyncOpenAI], ids=["sync", "async"])
def asking(request):
    return Asking(request.param)


@pytest.fixture
def chats(asking, smollm2):
    """`create` of openai's chats, with what it gives."""
    create = asking.client(smollm2).chat.completions.create
    return lambda **body: asking.get(create(**({"model": "smollm2", "messages": ASK} | GREEDY | body)))


def test_openai_chats(asking, smollm2, chats):
    answer = chats()
    text = answer.choices[0].message.content
    assert "Paris" in text
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    create = asking.client(smollm2).chat.completions.create
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = asking.all(create(model="smollm2", messages=ASK, **GREEDY, **stream))
    assert len(events) > 3
    assert "".join(event.choices[0].delta.content or "" for event in events) == text
    assert events[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert last.usage.completion_tokens == answer.usage.completion_tokens


def test_openai_completions(asking, smollm2):
    create = asking.client(smollm2).completions.create
    answer = asking.get(create(model="smollm2", prompt=COUNT, **GREEDY))
    assert "four" in answer.choices[0].text
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = asking.all(create(model="smollm2", prompt=COUNT, **GREEDY, **stream))
    assert "".join(event.choices[0].text for event in events) == answer.choices[0].text
    assert last.usage.completion_tokens == answer.usage.completion_tokens == 24


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_openai_calls_a_tool_and_tells_its_result(chats, choice):
    offered = [WEATHER] if choice == "required" else [OTHER, WEATHER]
    said = chats(**(CALLS | FORMED | {"tools": offered, "tool_choice": choice})).choices[0].message
    (call,) = said.tool_calls
    assert call.function.name == "weather"
    Weather.model_validate_json(call.function.arguments)
    history = [*ASK, said, {"role": "tool", "tool_call_id": call.id, "content": "mild"}]
    assert chats(messages=history, tools=[WEATHER]).choices[0].message.content


def test_openai_streams_a_call(asking, smollm2):
    """The client puts it together itself."""
    client = asking.client(smollm2)
    body = {"model": "smollm2", "messages": ASK} | CALLS | FORMED
    if isinstance(client, openai.OpenAI):
        with client.chat.completions.stream(**body) as stream:
            answer = stream.get_final_completion()
    else:

        async def streamed():
            async with client.chat.completions.stream(**body) as stream:
                return await stream.get_final_completion()

        answer = asking.get(streamed())
    assert answer.choices[0].finish_reason == "tool_calls"
    Weather.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)


def test_openai_parses_a_model_of_pydantic(asking, smollm2):
    client = asking.client(smollm2)
    body = {"model": "smollm2", "messages": ASK} | FORMED
    answer = asking.get(client.chat.completions.parse(response_format=Weather, **body))
    said = answer.choices[0].message
    assert isinstance(said.parsed, Weather)
    assert said.parsed == Weather.model_validate_json(said.content)
    body["messages"] = [*ASK, said, {"role": "user", "content": "And in Rome?"}]  # its answer goes back as it is
    again = asking.get(client.chat.completions.parse(response_format=Weather, **body))
    assert isinstance(again.choices[0].message.parsed, Weather)
    tool = openai.pydantic_function_tool(Weather)
    called = asking.get(client.chat.completions.parse(**(CALLS | body | {"tools": [tool]})))
    said = called.choices[0].message
    assert isinstance(said.tool_calls[0].function.parsed_arguments, Weather)
    body["messages"] = [*ASK, said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "mild"}]
    assert asking.get(client.chat.completions.create(**body)).choices[0].message.content


def test_openai_log_probabilities_and_several_texts(chats):
    answer = chats(logprobs=True, top_logprobs=3, max_tokens=5)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert bytes(entry.bytes).decode() == entry.token

    def texts(seed):
        choices = chats(n=3, temperature=1.5, seed=seed, max_tokens=12).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        return [choice.message.content for choice in choices]

    assert texts(7) == texts(7) != texts(8)
    assert len(set(texts(7))) == 3


def test_openai_stops_and_biases(asking, smollm2, chats):
    text = chats().choices[0].message.content
    before, stop, _ = text.partition(" Paris")
    assert stop
    stopped = chats(stop=[" Paris"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (before, "stop")
    paris = smollm2.client.post("/tokenize", json={"prompt": " Paris"}).json()["tokens"]
    assert "Paris" not in chats(logit_bias={str(token): -100 for token in paris}).choices[0].message.content


def test_openai_extra_body(chats):
    """vLLM's fields."""

    def said(**extra):
        return chats(extra_body=extra).choices[0].message.content

    assert said(structured_outputs={"choice": ["Lyon", "Nice"]}) in ("Lyon", "Nice")
    assert said(guided_regex="[A-Z]{4}-[0-9]{2}").replace("-", "").isalnum()
    assert said(top_k=1, repetition_penalty=1.0, min_p=0.0) == said()
    assert len(said(min_tokens=20, ignore_eos=True)) > 20
    assert chats(extra_body={"return_token_ids": True}).choices[0].token_ids


def test_openai_embeddings(asking, smollm2):
    """Of which the client asks for base64, unless it is told otherwise."""
    create = asking.client(smollm2).embeddings.create
    both = asking.get(create(model="smollm2", input=["Paris", "Rome"]))
    first, second = (each.embedding for each in both.data)
    assert len(first) == 576
    assert sum(value**2 for value in first) == pytest.approx(1, abs=1e-3)
    assert first != second
    floats = asking.get(create(model="smollm2", input="Paris", encoding_format="float")).data[0].embedding
    assert floats == pytest.approx(first, abs=1e-2)  # one prompt and two take other kernels
    assert both.usage.prompt_tokens == both.usage.total_tokens > 1


def test_openai_models(asking, smollm2):
    client = asking.client(smollm2)
    assert [model.id for model in asking.all(client.models.list())] == ["smollm2"]
    assert asking.get(client.models.retrieve("smollm2")).owned_by == "pace"


def test_openai_request_ids(asking, smollm2, chats):
    raw = asking.get(
        asking.client(smollm2).chat.completions.with_raw_response.create(
            model="smollm2", messages=ASK, max_tokens=2, extra_headers={"X-Request-ID": "of-the-client"}
        )
    )
    assert raw.headers["X-Request-ID"] == "of-the-client"
    assert raw.parse().id == "chatcmpl-of-the-client"
    answer = chats(max_tokens=2)
    assert answer.id == f"chatcmpl-{answer._request_id}"


def test_openai_errors(asking, locked):
    client = asking.client(locked, "open")

    def fails(kind, client=client, **body):
        with pytest.raises(kind) as caught:
            asking.get(client.chat.completions.create(**({"model": "tiny", "messages": ASK, "max_tokens": 2} | body)))
        assert caught.value.request_id
        return caught.value

    bad = fails(openai.BadRequestError, temperature=-1)
    assert (bad.status_code, bad.param, bad.type) == (400, "temperature", "invalid_request_error")
    assert "temperature is -1" in bad.message
    assert fails(openai.NotFoundError, model="other").code == "model_not_found"
    assert fails(openai.AuthenticationError, asking.client(locked, "wrong")).code == "invalid_api_key"
    with locked.busy():
        full = fails(openai.RateLimitError)
    assert (full.code, full.response.headers["Retry-After"]) == ("queue_full", "1")
    with pytest.raises(openai.BadRequestError):  # before there is a stream
        asking.all(client.chat.completions.create(model="tiny", messages=ASK, stream=True, top_p=0))


# --- litellm ---


@pytest.fixture(scope="module")
def lite(smollm2):
    """litellm, and what all of its calls have in common."""
    import litellm

    litellm.suppress_debug_info = True
    return litellm, {"model": "openai/smollm2", "api_base": base(smollm2), "api_key": "none"}


def test_litellm(lite):
    litellm, common = lite
    answer = litellm.completion(messages=ASK, **common, **GREEDY)
    text = answer.choices[0].message.content
    assert "Paris" in text
    assert answer.usage.completion_tokens > 3
    *events, last = litellm.completion(
        messages=ASK, **common, **GREEDY, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(event.choices[0].delta.content or "" for event in events) == text
    assert last.usage.completion_tokens == answer.usage.completion_tokens
    again = asyncio.run(litellm.acompletion(messages=ASK, **common, **GREEDY, seed=1, n=2, stop=["\n"]))
    assert len(again.choices) == 2


def test_litellm_calls_parses_and_embeds(lite):
    litellm, common = lite
    called = litellm.completion(messages=ASK, **common, **FORMED, **CALLS)
    Weather.model_validate_json(called.choices[0].message.tool_calls[0].function.arguments)
    formed = litellm.completion(messages=ASK, **common, **FORMED, response_format=Weather)
    Weather.model_validate_json(formed.choices[0].message.content)
    embedded = litellm.embedding(input=["Paris"], **common)
    assert len(embedded.data[0]["embedding"]) == 576


def test_litellm_errors(lite, locked):
    litellm, _ = lite
    tiny = {"model": "openai/tiny", "api_base": base(locked), "api_key": "open", "max_retries": 0, "messages": ASK}
    for kind, wrong in (
        (litellm.BadRequestError, {"temperature": -1}),
        (litellm.NotFoundError, {"model": "openai/other"}),
        (litellm.AuthenticationError, {"api_key": "wrong"}),
    ):
        with pytest.raises(kind):
            litellm.completion(**(tiny | wrong))
    with locked.busy(), pytest.raises(litellm.RateLimitError):
        litellm.completion(**tiny)


# --- langchain ---


@pytest.fixture
def langchain(smollm2):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model="smollm2", **settings(smollm2), **FORMED, max_retries=0)


def test_langchain(langchain):
    question = ASK[0]["content"]
    answer = langchain.invoke(question)
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 3
    whole = None
    for piece in langchain.stream(question, stream_usage=True):
        whole = piece if whole is None else whole + piece
    assert whole.content == answer.content
    assert whole.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    assert asyncio.run(langchain.ainvoke(question)).content == answer.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_parses(langchain, method):
    assert isinstance(langchain.with_structured_output(Weather, method=method).invoke("How is Paris?"), Weather)


def test_langchain_calls_a_tool(langchain):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool(args_schema=Weather)
    def weather(city, degrees):
        """Tells the weather."""
        return f"{degrees} in {city}"

    asked, asking = (
        HumanMessage("How is Paris?"),
        {"tool_choice": "required", "strict": True, "parallel_tool_calls": False},
    )
    called = langchain.bind_tools([weather], **asking).invoke([asked])
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    assert langchain.bind_tools([weather]).invoke([asked, called, result]).content
    streamed = None
    for piece in langchain.bind_tools([weather], tool_choice="weather", strict=True).stream([asked]):
        streamed = piece if streamed is None else streamed + piece
    Weather.model_validate(streamed.tool_calls[0]["args"])


def test_langchain_embeds(smollm2):
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(model="smollm2", **settings(smollm2), check_embedding_ctx_length=False)
    assert [len(each) for each in embeddings.embed_documents(["Paris", "Rome"])] == [576, 576]


def test_langchain_errors(locked):
    from langchain_openai import ChatOpenAI

    common = {"model": "tiny", "max_retries": 0} | settings(locked, "open")
    for kind, wrong in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.NotFoundError, {"model": "other"}),
        (openai.AuthenticationError, {"api_key": "wrong"}),
    ):
        with pytest.raises(kind):
            ChatOpenAI(**(common | wrong)).invoke("Hi")
    with locked.busy(), pytest.raises(openai.RateLimitError):
        ChatOpenAI(**common).invoke("Hi")


# --- openai for JavaScript ---


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A folder with npm's openai and the script beside it, which is how node finds it."""
    if missing := [name for name in ("node", "npm") if shutil.which(name) is None]:
        pytest.skip(f"{' and '.join(missing)}: not installed")
    folder = tmp_path_factory.mktemp("node")
    install = ["npm", "install", "--prefix", folder, "--no-audit", "--no-fund", "--loglevel=error", NODE_OPENAI]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"npm can't install {NODE_OPENAI} here: {' '.join(done.stderr.split())[:200]}")
    return shutil.copy(Path(__file__).parent / "openai_client.mjs", folder)


def test_javascript(node, smollm2):
    run = subprocess.run(
        ["node", node, base(smollm2), "smollm2"], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert "Paris" in seen["chat"]
    assert seen["stream"]["text"] == seen["chat"]
    assert seen["stream"]["usage"]["completion_tokens"] > 3
    assert "four" in seen["completion"]
    assert seen["completionStream"]["text"] == seen["completion"]
    assert seen["completionStream"]["usage"]["completion_tokens"] == 24
    for call in (seen["call"], seen["streamedCall"]):
        assert call["name"] == "weather"
        Weather.model_validate_json(call["arguments"])
    Weather.model_validate(seen["parsed"])
    assert seen["embedding"] == 576
    assert seen["models"] == ["smollm2"]
    assert seen["requestID"]
    assert seen["header"]
    bad, absent = seen["badRequest"], seen["notFound"]
    assert (bad["name"], bad["status"], bad["param"]) == ("BadRequestError", 400, "temperature")
    assert (absent["name"], absent["status"]) == ("NotFoundError", 404)
    assert bad["requestID"]
