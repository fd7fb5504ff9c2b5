"""What clients may send and what they get: each field has an effect or is refused, answers are as OpenAI has them."""

import asyncio
import base64
import json
import logging
import os
import re
import ssl
import subprocess
import sys
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import yaml
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from pace.options import read_config
from pace.server.admission import Admission
from pace.server.app import create_app
from pace.server.config import ServerConfig
from pace.server.log import Handler
from pace.server.metrics import Metrics, RequestMeter
from pace.server.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from pace.server.service import Exchange
from tests.engine.fakes import BOS, EOS, FIRST_BYTE, VOCABULARY, byte_tokens, write_model
from tests.test_deploy import METRICS

from .running import Server

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
HI = [{"role": "user", "content": "hi"}]
SAID = "<s>user: hi\n"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "sums",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2, 3]}, "b": {"enum": [4, 5, 6]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
ADDS, NOWS = ({"type": "function", "function": {"name": name}} for name in ("add", "now"))
CALL = r'<tool_call>\n\{"name": "add", "arguments": \{"a": [1-3], "b": [4-6]\}\}\n</tool_call>'

# Knows tools, documents and whether to think; a thinking reply begins within <think>.
TEMPLATE = (
    "{% if tools %}<s>tools: {{ tools | tojson }}\n{% endif %}"
    "{% if documents %}<s>documents: {{ documents | tojson }}\n{% endif %}"
    "{% for message in messages %}<s>{{ message.name or message.role }}: {{ message.content }}"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
    "{% for call in message.tool_calls %}[{{ call.id }} {{ call.function.name }} {{ call.function.arguments.a }}]"
    "{% endfor %}{% if message.tool_call_id %} for {{ message.tool_call_id }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: <think>\n"
    "{% if not enable_thinking %}{{ '\n' }}</think>\n\n{% endif %}{% endif %}"
)
THINK_ENDS = VOCABULARY - 1


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """Of a tiny model that has a template with all that there is, and adds a token to prompts."""
    path = tmp_path_factory.mktemp("rich-server")
    write_model(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_tokens(["<think>", "</think>"])
    assert backend.token_to_id("</think>") == THINK_ENDS
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.save(str(path / "tokenizer.json"))
    flags = ("--engines", 1, "--served-model-name", "rich", "--kv-cache-bytes", "8M", "--log-prompts")
    with Server(path, *flags, log=path / "log") as running:
        yield running


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status, words, **fields):
    """In OpenAI's shape, with what is wrong."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert {name: error[name] for name in fields} == fields
    assert response.headers["x-request-id"]
    return error


def complete(server, **body):
    """All of an answer, as OpenAI's schema has it."""
    answer = ok(server.post(COMPLETIONS, **body))
    Completion.model_validate(_without_nulls(answer), strict=True)
    for choice in answer["choices"]:
        assert choice.keys() >= {"index", "text", "logprobs", "finish_reason"}
    return answer


def _without_nulls(answer):
    """Where OpenAI answers with null as well, and its schema does not say so."""
    copy = json.loads(json.dumps(answer))
    for choice in copy["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for values, other in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if choice["logprobs"]:
                choice["logprobs"][values] = [other if value is None else value for value in choice["logprobs"][values]]
    return copy


def chat(server, messages=HI, **body):
    answer = ok(server.post(CHAT, messages=messages, **body))
    ChatCompletion.model_validate(answer, strict=True)
    for choice in answer["choices"]:
        assert choice.keys() >= {"index", "message", "logprobs", "finish_reason"}
        assert choice["message"].keys() >= {"role", "content", "refusal"}
    return answer


def events(server, path, **body):
    with server.client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200, lines
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    found = [json.loads(line[6:]) for line in lines[:-1]]
    for event in found:
        if path == CHAT:
            ChatCompletionChunk.model_validate(event, strict=True)
            assert all(choice.keys() >= {"index", "delta", "finish_reason"} for choice in event["choices"])
        else:
            Completion.model_validate(_without_nulls(event), strict=True)
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in found}) == 1
    return found


def joined(found):
    """Of a streamed chat, each choice as the whole answer has it."""
    choices = {}
    for choice in (choice for event in found for choice in event["choices"]):
        whole = choices.setdefault(
            choice["index"], {"calls": [], "content": "", "reasoning_content": "", "logprobs": []}
        )
        delta = choice["delta"]
        for name in ("content", "reasoning_content"):
            whole[name] += delta.get(name) or ""
        whole["calls"] += [call["function"] for call in delta.get("tool_calls", ())]
        whole["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
        whole["finish_reason"] = choice["finish_reason"]
    return [choices[index] for index in sorted(choices)]


def message(answer):
    return answer["choices"][0]["message"]


def prompt_of(server, messages=HI, **body):
    """What the model is given to read."""
    tokens = chat(server, messages, max_tokens=1, return_token_ids=True, **body)["prompt_token_ids"]
    return ok(server.post("/detokenize", tokens=tokens))["prompt"]


# --- every field ---

SEEDED = {"temperature": 1.0, "seed": 3, "max_tokens": 40}


def biased(*tokens, **more):
    """Only these tokens are said, if any."""
    return {"logit_bias": {str(token): 100 for token in tokens}, "max_tokens": 8} | more


A = FIRST_BYTE + ord("a")
# Of each field a request without it, and what it is then; the answers differ.
SAMPLED = {
    "max_tokens": ({}, {"max_tokens": 3}),
    "n": ({}, {"n": 2}),
    "seed": ({}, {"seed": 4}),
    "stop": (biased(A), {"stop": "aaa"}),
    "temperature": ({}, {"temperature": 0}),
    "top_p": ({}, {"top_p": 0.05}),
    "frequency_penalty": ({}, {"frequency_penalty": 2}),
    "presence_penalty": ({}, {"presence_penalty": -2}),
    "logit_bias": ({}, biased(A)),
    "best_of": ({}, {"best_of": 5}),
    "top_k": ({}, {"top_k": 1}),
    "min_p": ({}, {"min_p": 0.9}),
    "typical_p": ({}, {"typical_p": 0.05}),
    "repetition_penalty": ({}, {"repetition_penalty": 50}),
    "min_tokens": (biased(EOS), {"min_tokens": 4}),
    "stop_token_ids": (biased(A), {"stop_token_ids": [A]}),
    "bad_words": (biased(A), {"bad_words": ["a"]}),
    "ignore_eos": (biased(EOS), {"ignore_eos": True}),
    "include_stop_str_in_output": (biased(A, stop="aaa"), {"include_stop_str_in_output": True}),
    "skip_special_tokens": (biased(BOS), {"skip_special_tokens": False}),
    "prompt_logprobs": ({}, {"prompt_logprobs": 1}),
    "return_token_ids": ({}, {"return_token_ids": True}),
    "truncate_prompt_tokens": ({}, {"truncate_prompt_tokens": 4}),
    "response_format": ({}, {"response_format": {"type": "json_object"}}),
    "structured_outputs": ({}, {"structured_outputs": {"choice": ["ab", "cd"]}}),
    "guided_json": ({}, {"guided_json": {"enum": ["ab", "cd"]}}),
    "guided_regex": ({}, {"guided_regex": "[xy]{5}"}),
    "guided_choice": ({}, {"guided_choice": ["ab", "cd"]}),
    "guided_grammar": ({}, {"guided_grammar": 'root ::= "ab" | "cd"'}),
}
COMPLETED = SAMPLED | {
    "prompt": ({}, {"prompt": "another"}),
    "logprobs": ({}, {"logprobs": 2}),
    "echo": ({}, {"echo": True}),
    "add_special_tokens": ({}, {"add_special_tokens": False}),
}
THINKING = {"chat_template_kwargs": {"enable_thinking": True}}
CHATTED = SAMPLED | {
    "messages": ({}, {"messages": [{"role": "user", "content": "another"}]}),
    "max_completion_tokens": ({"max_tokens": 8}, {"max_completion_tokens": 3}),
    "logprobs": ({}, {"logprobs": True}),
    "top_logprobs": ({"logprobs": True}, {"top_logprobs": 2}),
    "tools": ({}, {"tools": [ADD]}),
    "tool_choice": ({"tools": [NOW]}, {"tool_choice": "none"}),
    "parallel_tool_calls": (
        {"tools": [ADD], "guided_regex": f"({CALL}){{2}}", "max_tokens": 150},
        {"parallel_tool_calls": False},
    ),
    "reasoning_effort": ({}, {"reasoning_effort": "low"}),
    "include_reasoning": (THINKING, {"include_reasoning": False}),
    "add_generation_prompt": ({}, {"add_generation_prompt": False}),
    "continue_final_message": ({}, {"continue_final_message": True}),
    "chat_template_kwargs": ({}, THINKING),
    "documents": ({}, {"documents": [{"title": "one", "text": "two"}]}),
}
EMBEDDED = {
    "input": ({}, {"input": "another"}),
    "encoding_format": ({}, {"encoding_format": "base64"}),
    "pooling": ({}, {"pooling": "mean"}),
    "normalize": ({}, {"normalize": False}),
}
# What takes only the value that has no effect, with one that is refused.
ONLY = {
    "spaces_between_special_tokens": False,
    "suffix": "end",
    "modalities": ["audio"],
    "service_tier": "flex",
    "store": True,
    "dimensions": 8,
}
ELSEWHERE = {  # tested below, but for priority: the order in which engines take requests
    *("model", "stream", "stream_options", "user", "request_id", "metadata", "priority")
}
ROUTES = {
    COMPLETIONS: (CompletionRequest, COMPLETED, {"prompt": "The sky is"} | SEEDED),
    CHAT: (ChatRequest, CHATTED, {"messages": HI} | SEEDED),
    EMBEDDINGS: (EmbeddingRequest, EMBEDDED, {"input": "The sky"}),
}


def telling(answer):
    """What an answer says, but for what each answer has of its own."""
    kept = {name: value for name, value in answer.items() if name not in ("id", "created")}
    return re.sub(r"call_\w{24}", "call", json.dumps(kept))


@pytest.mark.parametrize("path", ROUTES)
def test_all_fields_are_tested(path):
    schema, fields, _ = ROUTES[path]
    assert schema.model_fields.keys() - ELSEWHERE - ONLY.keys() == fields.keys()


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, (_, fields, _) in ROUTES.items() for field in fields]
)
def test_a_field_has_an_effect(rich, path, field):
    _, fields, base = ROUTES[path]
    without, changed = fields[field]
    before, again, after = (
        telling(ok(rich.post(path, **(base | body)))) for body in (without, without, without | changed)
    )
    cached = r'"cached_tokens": \d+'
    assert re.sub(cached, "", before) == re.sub(cached, "", again)
    assert re.sub(cached, "", before) != re.sub(cached, "", after)


@pytest.mark.parametrize(
    ("path", "field"), [(p, f) for p, (s, _, _) in ROUTES.items() for f in ONLY if f in s.model_fields]
)
def test_a_field_that_takes_one_value(server, path, field):
    base = ROUTES[path][2]
    refused(server.post(path, **base, **{field: ONLY[field]}), 400, field, param=field)


@pytest.mark.parametrize("path", [*ROUTES, "/tokenize", "/detokenize"])
def test_an_unknown_field_is_named(server, path):
    body = ROUTES[path][2] if path in ROUTES else {"tokens": [5]} if path == "/detokenize" else {"prompt": "a"}
    refused(server.post(path, **body, temprature=1), 400, "temprature is no field", param="temprature")


def test_an_unknown_field_within_a_field_is_named(server):
    refused(server.post(CHAT, messages=[HI[0] | {"mood": "good"}]), 400, "mood is no field", param="mood")
    form = {"type": "json_object", "schema": {}}
    refused(server.post(CHAT, messages=HI, response_format=form), 400, "schema is no field")


@pytest.mark.parametrize(
    ("path", "body", "words", "param"),
    [
        (COMPLETIONS, {}, "prompt: Field required", "prompt"),
        (COMPLETIONS, {"prompt": 5}, "prompt: ", "prompt"),
        (COMPLETIONS, {"prompt": ""}, "the prompt is empty", None),
        (COMPLETIONS, {"prompt": [VOCABULARY]}, f"token {VOCABULARY} of the prompt", None),
        (COMPLETIONS, {"prompt": "a" * 512}, "the prompt has 512 tokens; the model's context is 512", None),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens is 0", "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, "max_tokens: ", "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temperature": "1"}, "temperature: ", "temperature"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature is -1.0", "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p is 0", "top_p"),
        (COMPLETIONS, {"prompt": "a", "stream": "true"}, "stream: ", "stream"),
        (COMPLETIONS, {"prompt": "a", "n": 65}, "max_texts is 64", "n"),
        (COMPLETIONS, {"prompt": ["a"] * 65}, "max_texts is 64", "n"),
        (COMPLETIONS, {"prompt": "a", "n": 3, "best_of": 2}, "best_of is 2", "best_of"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "best_of is 2", "best_of"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias has 'x'", "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"999": 1}}, "token 999 of logit_bias", None),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, "stop is ", "stop"),
        (COMPLETIONS, {"prompt": "a", "guided_choice": []}, "guided_choice is []", "guided_choice"),
        (COMPLETIONS, {"prompt": "a", "guided_regex": "("}, "guided_regex can't be followed", "guided_regex"),
        (COMPLETIONS, {"prompt": "a", "guided_regex": "a", "guided_choice": ["a"]}, "give one", "guided_regex"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options goes with stream", "stream_options"),
        (COMPLETIONS, {"prompt": "a", "echo": True, "stream": True, "logprobs": 1}, "echo with logprobs", "echo"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "prompt_logprobs": 1}, "is not streamed", "prompt_logprobs"),
        (
            COMPLETIONS,
            {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
            "goes with include_usage",
            "stream_options",
        ),
        (COMPLETIONS, {"prompt": "a", "user": "u" * 513}, "user: ", "user"),
        (CHAT, {"messages": HI, "metadata": {str(i): "" for i in range(17)}}, "metadata: ", "metadata"),
        (COMPLETIONS, {"prompt": "a", "request_id": "two words"}, "request_id: ", "request_id"),
        (COMPLETIONS, {"prompt": "\ud800"}, "not Unicode", "prompt"),
        (CHAT, {"messages": []}, "messages: ", "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "needs content", "messages"),
        (CHAT, {"messages": [{"role": "boss", "content": "a"}]}, "messages.0.role: ", "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs text", "messages"),
        (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "a tool has the type", None),
        (CHAT, {"messages": HI, "tool_choice": "required"}, "there are no tools", "tool_choice"),
        (CHAT, {"messages": HI, "tools": [ADD], "tool_choice": "perhaps"}, "tool_choice is 'perhaps'", "tool_choice"),
        (CHAT, {"messages": HI, "tools": [ADD], "tool_choice": NOWS}, "names 'now'", "tool_choice"),
        (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs goes with logprobs", "top_logprobs"),
        (CHAT, {"messages": HI, "reasoning_effort": "low"}, "how much to think", "reasoning_effort"),
        (CHAT, {"messages": HI, "documents": [{}]}, "does not know documents", "documents"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"mood": 1}}, "does not know mood", "chat_template_kwargs"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": []}}, "are fields", "chat_template_kwargs"),
        (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, "json_schema goes", "response_format"),
        (EMBEDDINGS, {"input": []}, "input: ", "input"),
        (EMBEDDINGS, {"input": "a" * 513}, "the prompt has 513 tokens", None),
        ("/tokenize", {}, "give one of prompt, content and messages", None),
        ("/tokenize", {"prompt": "a", "content": "b"}, "give one of prompt, content and messages", None),
    ],
)  # fmt: skip
def test_a_refusal_says_what_is_wrong(server, path, body, words, param):
    content = json.dumps(body).encode()  # httpx would not send half a surrogate pair
    response = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    refused(response, 400, words, type="invalid_request_error", param=param)


def test_a_part_that_is_an_image_is_refused(server):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]}
    refused(server.post(CHAT, **body), 400, "the model takes text, and no images", param="messages")
    sound = {"type": "input_audio", "input_audio": {}}
    refused(server.post(CHAT, messages=[{"role": "user", "content": [sound]}]), 400, "messages.0.content.0.type")


# --- completions ---


def test_a_completion(server):
    answer = complete(server, prompt="abc", max_tokens=5, temperature=0, model="tiny")
    assert re.fullmatch(r"cmpl-\w{24}", answer["id"])
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 5, 8)
    assert usage["prompt_tokens_details"]["cached_tokens"] <= 2


def test_prompts_as_text_and_as_tokens_alone_and_several(server):
    asked = {"max_tokens": 6, "temperature": 0}
    alone = [complete(server, prompt=text, **asked)["choices"][0]["text"] for text in ("abc", "xyz")]
    texts = complete(server, prompt=["abc", "xyz"], **asked)
    assert [choice["text"] for choice in texts["choices"]] == alone
    assert [choice["index"] for choice in texts["choices"]] == [0, 1]
    assert (texts["usage"]["prompt_tokens"], texts["usage"]["completion_tokens"]) == (6, 12)
    ids = complete(server, prompt=[byte_tokens("abc"), byte_tokens("xyz")], **asked)
    assert [choice["text"] for choice in ids["choices"]] == alone
    assert complete(server, prompt=byte_tokens("xyz"), **asked)["choices"][0]["text"] == alone[1]


def test_several_texts_of_several_prompts_and_seeds(server):
    asked = {"max_tokens": 8, "temperature": 1, "seed": 5, "n": 2}
    both = complete(server, prompt=["abc", "xyz"], **asked)["choices"]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    apart = [
        choice["text"] for prompt in ("abc", "xyz") for choice in complete(server, prompt=prompt, **asked)["choices"]
    ]
    assert [choice["text"] for choice in both] == apart
    assert len(set(apart)) == 4


def test_an_echo_and_the_log_probabilities_of_a_prompt(server):
    alone = complete(server, prompt="hello", max_tokens=0, echo=True, logprobs=2)
    (choice,) = alone["choices"]
    assert choice["text"] == "hello"
    assert alone["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("hello")
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    for token, value, top in zip(
        *(logprobs[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert 2 <= len(top) <= 3
        assert top[token] == value < 0
    longer = complete(server, prompt="hello", max_tokens=3, echo=True, logprobs=2, temperature=0)["choices"][0]
    assert longer["text"].startswith("hello")
    assert longer["logprobs"]["token_logprobs"][:5] == logprobs["token_logprobs"]
    assert len(longer["logprobs"]["tokens"]) == 8
    without = complete(server, prompt="hello", max_tokens=3, logprobs=2, temperature=0)["choices"][0]
    assert longer["text"] == "hello" + without["text"]
    assert longer["logprobs"]["token_logprobs"][5:] == without["logprobs"]["token_logprobs"]
    assert complete(server, prompt=byte_tokens("hello"), max_tokens=0, echo=True)["choices"][0]["text"] == "hello"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "abc"},
        {"prompt": ["abc", "xyz"], "n": 2},
        {"prompt": "abc", "echo": True},
        {"prompt": "abc", "logprobs": 1},
        {"prompt": "abc", "max_tokens": 0, "echo": True},
    ],
)
def test_a_streamed_completion_is_the_whole_one(server, body):
    body = {"max_tokens": 8, "temperature": 1, "seed": 2} | body
    whole = complete(server, **body)
    found = events(server, COMPLETIONS, **body, stream_options={"include_usage": True})
    *pieces, last = found
    assert last["choices"] == []
    assert all(piece["usage"] is None for piece in pieces)
    assert {name: last["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        name: whole["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    texts, ends, logprobs = {}, {}, {}
    for choice in (choice for piece in pieces for choice in piece["choices"]):
        index = choice["index"]
        texts[index] = texts.get(index, "") + choice["text"]
        ends[index] = choice["finish_reason"]
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                logprobs.setdefault(name, []).extend(values)
    assert [(texts[c["index"]], ends[c["index"]]) for c in whole["choices"]] == [
        (c["text"], c["finish_reason"]) for c in whole["choices"]
    ]
    assert (logprobs or None) == whole["choices"][0]["logprobs"]


def test_a_stream_gives_the_tokens_of_its_prompt_once(rich):
    asked = {"max_tokens": 6, "ignore_eos": True, "return_token_ids": True, "n": 2}
    found = events(rich, COMPLETIONS, prompt="abc", **asked)
    given = [choice["prompt_token_ids"] for event in found for choice in event["choices"] if len(choice) > 6]
    assert given == [[BOS, *byte_tokens("abc")]] * 2
    found = events(rich, CHAT, messages=HI, **asked)
    given = [event["prompt_token_ids"] for event in found if "prompt_token_ids" in event]
    assert given == [chat(rich, **asked)["prompt_token_ids"]] * 2


def test_an_echo_of_what_is_not_cut_is_as_it_was_given(rich):
    for last, echoed in ((1000, "abc"), (2, "bc")):
        answer = complete(rich, prompt="abc", max_tokens=0, echo=True, truncate_prompt_tokens=last)
        assert answer["choices"][0]["text"] == echoed


def test_two_fields_ask_for_log_probabilities_of_a_prompt(server):
    asked = {"prompt": "abc", "max_tokens": 0, "echo": True, "prompt_logprobs": 5, "logprobs": 1}
    (choice,) = complete(server, **asked)["choices"]
    assert all(len(row) >= 5 for row in choice["prompt_logprobs"][1:])
    assert all(len(row) <= 2 for row in choice["logprobs"]["top_logprobs"][1:])


def test_usage_with_each_event(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(server, COMPLETIONS, prompt="abc", max_tokens=6, ignore_eos=True, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert all("usage" not in event for event in events(server, COMPLETIONS, prompt="abc", max_tokens=2))


# --- chats ---


def test_a_chat(server):
    answer = chat(server, max_tokens=4, temperature=0, ignore_eos=True)
    assert re.fullmatch(r"chatcmpl-\w{24}", answer["id"])
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert answer["usage"]["completion_tokens"] == 4
    rendered = ok(server.post("/tokenize", messages=HI))["tokens"]
    assert answer["usage"]["prompt_tokens"] == len(rendered)
    text = complete(server, prompt=rendered, max_tokens=4, temperature=0, ignore_eos=True)["choices"][0]["text"]
    assert choice["message"]["content"].strip() == text.strip()


def test_a_stop_and_the_end_of_the_text(server):
    choice = chat(server, logit_bias={str(A): 100}, max_tokens=9, stop=["aaa"])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "aaa")
    choice = chat(server, logit_bias={str(EOS): 100}, max_tokens=9)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")


def test_the_log_probabilities_of_a_chat(server):
    body = {"max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3, "ignore_eos": True}
    answer = chat(server, **body, return_token_ids=True)
    (choice,) = answer["choices"]
    entries = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    assert len(entries) == 6
    for entry, token in zip(entries, choice["token_ids"], strict=True):
        piece = ok(server.post("/tokenize", content=entry["token"]))["tokens"] if token >= FIRST_BYTE else []
        if 0xFFFD not in map(ord, entry["token"]):
            assert bytes(entry["bytes"]).decode() == entry["token"]
            assert not piece or piece[0] == token or len(entry["token"]) > 1
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]  # the most probable was taken
        assert len(entry["top_logprobs"]) == 3
        assert all(other["bytes"] == list(other["bytes"]) for other in entry["top_logprobs"])
    assert [entry["logprob"] for entry in chat(server, **body)["choices"][0]["logprobs"]["content"]] == [
        entry["logprob"] for entry in entries
    ]
    (streamed,) = joined(events(server, CHAT, messages=HI, **body))
    assert streamed["logprobs"] == entries


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"stop": ["e", " "]},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": ADD["function"]["parameters"]},
            }
        },
        {"tools": [ADD, NOW], "tool_choice": "required"},
        {"tools": [ADD, NOW], "tool_choice": ADDS},
        {"tools": [ADD], "guided_regex": f"Well\\. {CALL}"},
        {"tools": [ADD], "guided_regex": f"({CALL}){{2}}"},
        {"tools": [ADD], "guided_regex": f"({CALL}){{2}}", "parallel_tool_calls": False},
        {"reasoning_effort": "high", "logit_bias": {str(THINK_ENDS): 5}},
        {"reasoning_effort": "high", "logit_bias": {str(THINK_ENDS): 5}, "include_reasoning": False},
    ],
)
def test_a_streamed_chat_is_the_whole_one(rich, body):
    body = {"max_tokens": 150, "temperature": 1, "seed": 6} | body
    whole = chat(rich, **body)
    *found, last = events(rich, CHAT, messages=HI, **body, stream_options={"include_usage": True})
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for streamed, choice in zip(joined(found), whole["choices"], strict=True):
        said = choice["message"]
        assert streamed["content"] == (said["content"] or "")
        assert streamed["reasoning_content"] == said.get("reasoning_content", "")
        assert streamed["calls"] == [call["function"] for call in said.get("tool_calls", ())]
        assert streamed["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize(
    ("choice", "several"), [("required", None), ("required", False), (ADDS, None), (NOWS, None), ("none", None)]
)
def test_a_choice_of_tools(rich, choice, several):
    asked = {} if several is None else {"parallel_tool_calls": several}
    for seed in range(3):
        answer = chat(rich, tools=[ADD, NOW], tool_choice=choice, max_tokens=150, temperature=1, seed=seed, **asked)
        said, end = message(answer), answer["choices"][0]["finish_reason"]
        if choice == "none":
            assert "tool_calls" not in said
            continue
        assert end in ("tool_calls", "length")
        calls = said.get("tool_calls", [])
        assert end == "length" or (calls and said["content"] is None)
        assert len(calls) <= 1 or (several is None and choice == "required")
        for call in calls:
            assert re.fullmatch(r"call_\w{24}", call["id"])
            assert choice == "required" or call["function"]["name"] == choice["function"]["name"]
            arguments = json.loads(call["function"]["arguments"])
            assert arguments.keys() == ({"a", "b"} if call["function"]["name"] == "add" else set())
            assert not arguments or (arguments["a"] in (1, 2, 3) and arguments["b"] in (4, 5, 6))
    assert ("tools: " in prompt_of(rich, tools=[ADD, NOW], tool_choice=choice)) == (choice != "none")


def test_calls_that_the_model_writes_on_its_own(rich):
    body = {"tools": [ADD], "max_tokens": 200, "temperature": 1, "seed": 1}
    answer = chat(rich, **body, guided_regex=f"Well\\. ({CALL}){{2}}")
    said = message(answer)
    assert said["content"] == "Well."
    assert len({call["id"] for call in said["tool_calls"]}) == 2
    assert all(json.loads(call["function"]["arguments"]).keys() == {"a", "b"} for call in said["tool_calls"])
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    one = message(chat(rich, **body, guided_regex=f"({CALL}){{2}}", parallel_tool_calls=False))
    assert len(one["tool_calls"]) == 1
    plain = message(chat(rich, max_tokens=200, guided_regex=CALL))
    assert plain["content"].startswith("<tool_call>")  # nobody offered a tool
    assert "tool_calls" not in plain


def test_a_form_and_a_forced_call_are_not_both_followed(server):
    body = {"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}}
    refused(server.post(CHAT, messages=HI, **body), 400, "tool_choice and a form", param="tool_choice")


def test_reasoning_is_told_from_content(rich):
    body = {"max_tokens": 60, "temperature": 1, "seed": 6, "logit_bias": {str(THINK_ENDS): 5}, "return_token_ids": True}
    answer = chat(rich, **body, reasoning_effort="high")
    raw = ok(rich.post("/detokenize", tokens=answer["choices"][0]["token_ids"]))["prompt"]
    reasoning, end, content = raw.partition("</think>")
    assert reasoning
    assert end
    assert message(answer)["reasoning_content"] == reasoning.strip()
    assert message(answer)["content"].strip() == content.replace("</s>", "").strip()
    hidden = message(chat(rich, **body, reasoning_effort="high", include_reasoning=False))
    assert hidden["content"] == message(answer)["content"]
    assert "reasoning_content" not in hidden
    assert "reasoning_content" not in message(chat(rich, **body, reasoning_effort="none"))


def test_a_form_leaves_no_room_for_thinking(rich):
    asked = {"reasoning_effort": "high", "guided_choice": ["yes", "no"]}
    said = message(chat(rich, **asked))
    assert said["content"] in ("yes", "no")
    assert "reasoning_content" not in said
    assert prompt_of(rich, **asked).endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("messages", "arguments", "prompt"),
    [
        (HI, {}, f"{SAID}<s>assistant: <think>\n\n</think>\n\n"),
        (HI, {"add_generation_prompt": False}, SAID),
        (HI, {"continue_final_message": True}, "<s>user: hi"),
        ([*HI, {"role": "assistant", "content": "So "}], {"continue_final_message": True}, f"{SAID}<s>assistant: So"),
        (
            [*HI, {"role": "assistant", "content": ")", "reasoning_content": "hm"}],
            {"continue_final_message": True},
            f"{SAID}<s>assistant: )",
        ),
        (
            [*HI, {"role": "assistant", "content": [{"type": "text", "text": "So"}, {"type": "text", "text": "it"}]}],
            {"continue_final_message": True},
            f"{SAID}<s>assistant: So\nit",
        ),
        (HI, {"reasoning_effort": "low"}, f"{SAID}<s>assistant: <think>\n"),
        (HI, {"reasoning_effort": "none"}, f"{SAID}<s>assistant: <think>\n\n</think>\n\n"),
        (HI, THINKING, f"{SAID}<s>assistant: <think>\n"),
        (HI, {"documents": [{"a": 1}], "add_generation_prompt": False}, '<s>documents: [{"a": 1}]\n<s>user: hi\n'),
        (
            [
                {"role": "developer", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
                {"role": "user", "content": "hi", "name": "Ann"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "hm",
                    "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "content": "5", "tool_call_id": "c1"},
                {"role": "assistant", "content": None, "refusal": "No."},
            ],
            {"add_generation_prompt": False},
            "<s>system: one\ntwo\n<s>Ann: hi\n<s>assistant: (hm)[c1 add 1]\n<s>tool: 5 for c1\n<s>assistant: No.\n",
        ),
    ],
)  # fmt: skip
def test_what_the_model_reads(rich, messages, arguments, prompt):
    assert prompt_of(rich, messages, **arguments) == prompt


def test_tools_are_described_to_a_model_whose_template_knows_none(server):
    prompt = prompt_of(server, tools=[NOW])
    assert '{"name": "now"}' in prompt
    assert "<tool_call>" in prompt
    called = [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": "{}"}}]}]
    history = [*HI, *called, {"role": "tool", "tool_call_id": "1", "content": "noon"}]
    assert "<tool_response>\nnoon\n</tool_response>" in prompt_of(server, history)


def test_a_history_whose_arguments_are_no_json(server):
    called = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": "{"}}]}
    refused(server.post(CHAT, messages=[*HI, called]), 400, "a call of now has the arguments '{'")


# --- embeddings ---


def test_embeddings(server):
    answer = ok(server.post(EMBEDDINGS, input=["abc", "xyz"], model="tiny"))
    CreateEmbeddingResponse.model_validate(answer, strict=True)
    first, second = (each["embedding"] for each in answer["data"])
    assert [each["index"] for each in answer["data"]] == [0, 1]
    assert first != second
    assert sum(value**2 for value in first) == pytest.approx(1, abs=1e-5)  # float32 on the wire
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    tokens = ok(server.post(EMBEDDINGS, input=[byte_tokens("xyz"), byte_tokens("abc")]))["data"]
    assert [each["embedding"] for each in tokens] == [second, first]
    packed = ok(server.post(EMBEDDINGS, input="abc", encoding_format="base64"))["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == first


# --- tokens, models, states ---


def test_tokens_and_back(server, rich):
    text = "hello world, ünï ✓"
    tokens = ok(server.post("/tokenize", prompt=text))
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 512
    back = ok(server.post("/detokenize", tokens=tokens["tokens"]))
    assert back == {"prompt": text, "content": text}
    strings = ok(server.post("/tokenize", prompt="hello world", return_token_strs=True))["token_strs"]
    assert "".join(strings) == "hello world"


def test_tokens_as_llama_server_has_them(rich):
    plain = ok(rich.post("/tokenize", content="ab"))["tokens"]
    assert plain == byte_tokens("ab")
    assert ok(rich.post("/tokenize", content="ab", add_special=True))["tokens"] == [BOS, *plain]
    pieces = ok(rich.post("/tokenize", content="bü", with_pieces=True))["tokens"]
    first, *others = "ü".encode()
    assert pieces == [
        {"id": FIRST_BYTE + ord("b"), "piece": "b"},
        *({"id": FIRST_BYTE + byte, "piece": [byte]} for byte in (first, *others)),
    ]


def test_tokens_as_vllm_has_them(rich):
    assert ok(rich.post("/tokenize", prompt="ab"))["tokens"] == [BOS, *byte_tokens("ab")]
    assert ok(rich.post("/tokenize", prompt="ab", add_special_tokens=False))["tokens"] == byte_tokens("ab")
    chat = ok(rich.post("/tokenize", messages=HI, tools=[NOW], add_generation_prompt=False))["tokens"]
    text = ok(rich.post("/detokenize", tokens=chat))["prompt"]
    assert text.startswith("<s>tools: [")
    assert text.endswith(SAID)
    assert chat[0] == BOS
    assert chat[1] != BOS


def test_models(server):
    listed = ok(server.client.get("/v1/models"))
    assert listed["object"] == "list"
    (model,) = listed["data"]
    Model.model_validate(model, strict=True)
    assert (model["id"], model["object"], model["owned_by"], model["max_model_len"]) == ("tiny", "model", "pace", 512)
    assert ok(server.client.get("/v1/models/tiny")) == model
    refused(server.client.get("/v1/models/other"), 404, "'other' is not served here; 'tiny' is", code="model_not_found")


@pytest.mark.parametrize("path", [*ROUTES, "/tokenize", "/detokenize"])
def test_another_model_is_not_found(server, path):
    body = ROUTES[path][2] if path in ROUTES else {"tokens": [5]} if path == "/detokenize" else {"prompt": "a"}
    response = server.post(path, **body, model="other")
    refused(response, 404, "'tiny' is", type="not_found_error", code="model_not_found", param="model")


@pytest.mark.parametrize("path", [*ROUTES, "/v1/models", "/v1/models/tiny"])
def test_routes_without_v1(server, path):
    short = path.removeprefix("/v1")
    method, body = ("POST", ROUTES[path][2]) if path in ROUTES else ("GET", None)
    answers = [telling(ok(server.client.request(method, each, json=body))) for each in (path, short)]
    cached = r'"cached_tokens": \d+'
    assert re.sub(cached, "", answers[0]) == re.sub(cached, "", answers[1])


def test_states(server):
    assert ok(server.client.get("/health")) == {"status": "ok"}
    assert ok(server.client.get("/ready")) == {"status": "ready", "engines": {"0": "up", "1": "up"}}
    assert re.fullmatch(r"\d+\.\d+.*", ok(server.client.get("/version"))["version"])


def test_metrics_are_those_of_the_dashboard(server):
    complete(server, prompt=["abc", "abd"], max_tokens=3)
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    shown = {}
    for family in text_string_to_metric_families(response.text):
        if not family.name.endswith("_created"):
            labels = {name for sample in family.samples for name in sample.labels} - {"le"}
            shown[family.name + "_total" * (family.type == "counter")] = (family.type, labels)
    assert shown == METRICS


def test_what_metrics_count(rich):
    def read():
        families = text_string_to_metric_families(rich.client.get("/metrics").text)
        return {
            (sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples
        }

    before = read()
    complete(rich, prompt="abcd", max_tokens=3, ignore_eos=True)
    refused(rich.post(COMPLETIONS, prompt="", add_special_tokens=False), 400, "empty")
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["pace_prompt_tokens_total",] == 5
    assert grown["pace_generation_tokens_total",] == 3
    assert grown["pace_requests_total", "completions", "ok"] == 1
    assert grown["pace_requests_total", "completions", "rejected"] == 1
    assert grown["pace_time_to_first_token_seconds_count",] == 1
    assert after["pace_requests_in_flight",] == after["pace_requests_waiting",] == 0


# --- errors and what stands around a request ---


def test_a_path_that_is_not_there(server):
    refused(server.client.get("/v1/nothing"), 404, "there is no /v1/nothing here", type="not_found_error")
    response = server.client.get(COMPLETIONS)
    refused(response, 405, "/v1/completions does not take GET", type="invalid_request_error")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "the body is not JSON"),
        (b"", "the body must be a JSON object"),
        (b"[1]", "the body must be a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature: "),
        (b'{"prompt": "a", "guided_json": ' + b'{"a": ' * 300 + b"1" + b"}" * 301, "guided_json: it is nested"),
    ],
)
def test_a_body_that_is_none(server, content, words):
    response = server.client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    refused(response, 400, words, type="invalid_request_error")


def test_a_body_of_another_type(server):
    response = server.client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    refused(response, 400, "Content-Type: application/json")


def test_the_id_of_a_request(server):
    def ask(headers=None, **body):
        return server.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1} | body, headers=headers)

    given = ask({"X-Request-ID": "my-own"})
    assert given.headers["x-request-id"] == "my-own"
    assert given.json()["id"] == "cmpl-my-own"
    assert ask({"X-Request-ID": "my-own"}, temperature=-1).headers["x-request-id"] == "my-own"
    assert ask({"X-Request-ID": "a b"}).headers["x-request-id"] != "a b"
    assert ask().headers["x-request-id"] != ask().headers["x-request-id"]
    named = ask({"X-Request-ID": "outer"}, request_id="inner", stream=True)
    assert named.headers["x-request-id"] == "inner"
    assert '"cmpl-inner"' in named.text


def test_the_line_of_a_request(server):
    chat(server, max_tokens=2, ignore_eos=True, request_id="line-1", user="Ann Lee", metadata={"team": "blue"})
    line = next(line for line in server.text.splitlines() if "request_id=line-1" in line)
    assert ' endpoint=chat outcome=ok user="Ann Lee" metadata={"team": "blue"} prompt_tokens=' in line
    assert re.search(r" output_tokens=2 cached_tokens=\d+ first_token=[\d.]+ seconds=[\d.]+$", line)
    server.post(COMPLETIONS, prompt="", request_id="line-2")
    assert re.search(r'request_id=line-2 .* outcome=rejected reason="the prompt is empty', server.text)
    events(server, COMPLETIONS, prompt="a secret", max_tokens=2, request_id="line-3")
    assert re.search("request_id=line-3 .* outcome=ok", server.text)
    assert "a secret" not in server.text


@pytest.mark.parametrize("as_json", [False, True])
def test_no_client_writes_more_than_its_part_of_a_line(as_json):
    """A terminal obeys ESC and U+009B, and readers end a line at some others."""
    record = logging.LogRecord("pace", logging.INFO, "", 0, "request", (), None)
    record.figures = {"user": "\x1b[2J\x9b2J\x85x\u2028y", "plain": "ü-1", "metadata": {"a": "\x9b"}, "seconds": 0.5}
    line = Handler(as_json, lambda: None).format(record)
    assert line.isprintable()
    assert r"\u001b[2J\u009b2J\u0085x\u2028y" in line
    assert as_json or line.endswith(r' plain=ü-1 metadata={"a": "\u009b"} seconds=0.5')


def test_the_time_of_a_token_is_that_of_one_text():
    metrics, admission = Metrics([], Admission(8, 8)), Admission(8, 8)
    meter = RequestMeter(metrics)
    exchange = Exchange(SimpleNamespace(metrics=metrics), "chat", None, "r", meter, admission.enter(4, 1))
    meter.first, meter.arrived = 0.0, meter.arrived - 10
    exchange.count(output_tokens=24)  # of each text six, so five after the first, in ten seconds
    exchange.close("ok")
    assert 2 <= metrics.registry.get_sample_value("pace_time_per_output_token_seconds_sum") < 2.1


def test_a_prompt_that_is_too_long_does_not_come_to_an_engine(guarded):
    with guarded.busy():
        refused(guarded.post(COMPLETIONS, prompt=[5] * 600, max_tokens=1), 400, "the prompt has 600 tokens")
        refused(guarded.post(EMBEDDINGS, input=[5] * 600), 400, "the prompt has 600 tokens")


def test_prompts_and_answers_in_the_log(rich):
    said = complete(rich, prompt=["one", "two"], guided_choice=["yes"], max_tokens=9, request_id="logged")
    assert [choice["text"] for choice in said["choices"]] == ["yes", "yes"]
    line = next(line for line in rich.text.splitlines() if "request_id=logged" in line)
    assert 'prompts=["<s>one", "<s>two"]' in line
    assert 'answers=["yes", "yes"]' in line


def test_no_other_origin_may_ask_where_none_is_named(server):
    response = server.client.get("/v1/models", headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in response.headers


def test_what_nobody_expected():
    """A 500 tells where to look, and nothing else."""

    def page():
        raise RuntimeError("a secret")

    config = ServerConfig(model="m")
    service = SimpleNamespace(config=config, tokenizer=None, metrics=SimpleNamespace(page=page))
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/metrics", headers={"X-Request-ID": "lost"})

    response = asyncio.run(ask())
    refused(response, 500, "see the server's log, request lost", type="server_error")
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "lost"


# --- a server with keys, a certificate, limits, and its options in a file ---


@pytest.fixture(scope="module")
def guarded(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*make.split(), "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True
    )
    (folder / "keys").write_text("cherry\n\n  damson  \n")
    (folder / "pace.toml").write_text(
        'served-model-name = "guarded"\nengines = 1\nkv_cache_bytes = 8_000_000\nlog_json = true\n'
        f'api_key = ["apple", "berry"]\napi_key_file = "{folder}/keys"\n'
        f'tls_cert = "{folder}/cert.pem"\ntls_key = "{folder}/key.pem"\n'
        'cors_origin = ["https://page.example"]\nmax_body_bytes = 2000\nmax_waiting = 3\n'
    )
    env = {"PACE_API_KEY": " elder\n"}
    with Server(tiny, "--config", folder / "pace.toml", "--max-waiting", 2, log=folder / "log", env=env) as running:
        running.folder = folder
        trusted = ssl.create_default_context(cafile=folder / "cert.pem")
        headers = {"Authorization": "Bearer apple"}
        running.client = httpx.Client(base_url=running.url, verify=trusted, headers=headers, timeout=60)
        yield running


def test_https_with_a_certificate(guarded):
    assert guarded.url.startswith("https://")
    assert ok(guarded.client.get("/v1/models"))["data"][0]["id"] == "guarded"
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"{guarded.url}/health")


@pytest.mark.parametrize("key", ["apple", "berry", "cherry", "damson", "elder"])
def test_a_key(guarded, key):
    for headers in ({"Authorization": f"Bearer {key}"}, {"Authorization": f"bearer  {key}"}):
        assert guarded.client.get("/v1/models", headers=headers).status_code == 200
    request = guarded.client.build_request("GET", "/v1/models")
    del request.headers["authorization"]
    assert guarded.client.send(request, auth=("anyone", key)).status_code == 200


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong", "Bearer appl", "apple", "Basic apple", "Basic !", "Token apple"]
)
def test_no_key(guarded, given):
    response = guarded.client.post(COMPLETIONS, json={"prompt": "a"}, headers={"Authorization": given})
    refused(response, 401, "Authorization: Bearer KEY", type="authentication_error", code="invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_what_is_open_without_a_key(guarded):
    for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 401), ("/v1/models", 401), ("/nothing", 401)):
        assert guarded.client.get(path, headers={"Authorization": ""}).status_code == status, path


def test_a_full_queue(guarded):
    with guarded.busy():
        response = guarded.post(COMPLETIONS, prompt="a", n=2, max_tokens=2)
    refused(response, 429, "max_waiting is 2", type="rate_limit_error", code="queue_full")
    assert int(response.headers["retry-after"]) > 0
    assert guarded.post(COMPLETIONS, prompt="a", n=2, max_tokens=2).status_code == 200


def test_a_body_that_is_too_large(guarded):
    body = json.dumps({"prompt": "a" * 300, "max_tokens": 1, "user": "u" * 2000}).encode()
    sent = {"headers": {"Content-Type": "application/json"}}
    for content in (body, iter([body[:1500], body[1500:]])):  # with Content-Length, and in chunks
        refused(guarded.client.post(COMPLETIONS, content=content, **sent), 413, "larger than 2000 bytes")
    fits = json.dumps({"prompt": "a" * 300, "max_tokens": 1, "stop": "s" * 1000}).encode()
    for content in (fits, iter([fits[:700], fits[700:]])):
        assert guarded.client.post(COMPLETIONS, content=content, **sent).status_code == 200


def test_an_origin_that_may_ask(guarded):
    origin = {"Origin": "https://page.example"}
    response = guarded.client.get("/v1/models", headers=origin)
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    assert response.headers["access-control-expose-headers"] == "Retry-After, X-Request-ID"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = guarded.client.options(CHAT, headers=origin | asked | {"Authorization": ""})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    other = guarded.client.get("/v1/models", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    denied = guarded.client.get("/v1/models", headers=origin | {"Authorization": ""})  # which the page may read
    assert (denied.status_code, denied.headers["access-control-allow-origin"]) == (401, "https://page.example")


def test_an_idle_client_does_not_keep_a_server_from_ending(tiny, guarded):
    """Over TLS, a connection is closed by both sides, and a client in a pool does not look at its own."""
    flags = ("--tls-cert", guarded.folder / "cert.pem", "--tls-key", guarded.folder / "key.pem")
    trusted = ssl.create_default_context(cafile=guarded.folder / "cert.pem")
    with Server(tiny, *flags, "--kv-cache-bytes", "1M", log=guarded.folder / "ends") as server:
        server.client = httpx.Client(base_url=server.url, verify=trusted)
        ok(server.client.get("/health"))
        assert server.stop(seconds=8) == 0


def test_a_log_of_json(guarded):
    chat(guarded, max_tokens=2, ignore_eos=True, request_id="in-json", metadata={"team": "blue"})
    lines = [json.loads(line) for line in guarded.text.splitlines()]
    assert all(line.keys() >= {"time", "level", "message"} for line in lines)
    (line,) = (line for line in lines if line.get("request_id") == "in-json")
    assert line["metadata"] == {"team": "blue"}
    assert (line["endpoint"], line["outcome"], line["output_tokens"]) == ("chat", "ok", 2)
    assert line["seconds"] >= line["first_token"] > 0
    assert not [key for key in ("apple", "berry", "cherry", "damson", "elder") if f'"{key}"' in guarded.text]


def print_config(*words, **env):
    run = subprocess.run(
        [sys.executable, "-m", "pace", "serve", *map(str, words), "--print-config"],
        capture_output=True,
        text=True,
        env=os.environ | env,
        check=True,
    )
    return run.stdout


@pytest.mark.parametrize("line", ["api-key:", "api-key: 5", "cors-origin: {a: b}", "1: 2"])
def test_a_configuration_that_can_not_be(tmp_path, line):
    (tmp_path / "c.yaml").write_text(f"model: m\n{line}\n")
    with pytest.raises(ValueError, match=r"it must be texts|1 is no option"):
        ServerConfig.of(read_config(str(tmp_path / "c.yaml")))


def test_keys_that_can_not_be(tmp_path):
    with pytest.raises(ValueError, match="api_key can't be what it is; it must be texts that are not empty"):
        ServerConfig(model="m", api_key=("secret", " "))  # which would let everyone in
    (tmp_path / "keys").write_text("früh\n")
    for given in ({"api_key": ("früh",)}, {"api_key_file": str(tmp_path / "keys")}):
        with pytest.raises(ValueError, match=r"an API key .* must be printable ASCII"):
            ServerConfig(model="m", **given).keys  # noqa: B018


def test_the_configuration_is_printed_without_keys(guarded, tmp_path):
    printed = print_config(
        "some-model", "--config", guarded.folder / "pace.toml", "--port", 81, "--api-key", "fig", PACE_API_KEY="elder"
    )
    assert not re.search("apple|berry|cherry|damson|elder|fig", printed)
    shown = yaml.safe_load(printed)
    assert (shown["model"], shown["port"], shown["engines"], shown["max_waiting"]) == ("some-model", 81, "1", 3)
    assert shown["cors_origin"] == ["https://page.example"]
    (tmp_path / "again.yaml").write_text(printed)
    assert print_config("--config", tmp_path / "again.yaml") == printed
