"""A server that speculates answers what another does, and tells what became of its drafts."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pace.server.config import ServerConfig

from .running import Server
from .test_api import CHAT, COMPLETIONS, ok

PROMPTS = ["abc", "hello world", "x" * 70, "one two one two", "ab ab ab ab"]
ASKED = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7, "n": 2},
    {"temperature": 0, "logprobs": 2, "repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 1, "stop": ["a"], "logit_bias": {"70": 4}},
    {"temperature": 0, "guided_regex": "(ab|wxyz){4,9}"},
]


@pytest.fixture(scope="module", params=["pard", "draft_model", "ngram"])
def speculating(request, tiny, tmp_path_factory):
    """The tiny model with itself as its draft, or none; with two engines, which share the draft's weights too."""
    path = tmp_path_factory.mktemp("draft")
    shutil.copytree(tiny, path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"pard_token": 0}))
    speculative = {"method": request.param, "num_tokens": 5, "adaptive": False}
    if request.param != "ngram":
        speculative["model"] = str(path)
    flags = ("--engines", 2, "--served-model-name", "tiny", "--kv-cache-bytes", "16M")
    caches = {"pard": "PAGED", "draft_model": "DYNAMIC", "ngram": "BMC"}
    with Server(
        tiny, *flags, "--cache", caches[request.param], "--speculative", json.dumps(speculative), log=path / "log"
    ) as running:
        running.method = request.param
        yield running


def bodies():
    return [
        {"prompt": prompt, "max_tokens": 30, "ignore_eos": True, "add_special_tokens": False} | more
        for prompt in PROMPTS
        for more in ASKED
    ]


def answers(server):
    """All at once."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda body: ok(server.post(COMPLETIONS, **body)), bodies()))
    return [each["choices"] for each in found], [each["usage"] for each in found]


def test_the_same_answers(server, speculating):
    (expected, plain), (given, usages) = answers(server), answers(speculating)
    assert given == expected
    assert all("completion_tokens_details" not in usage for usage in plain)
    details = [usage["completion_tokens_details"] for usage in usages if "completion_tokens_details" in usage]
    accepted = sum(each["accepted_prediction_tokens"] for each in details)
    rejected = sum(each["rejected_prediction_tokens"] for each in details)
    assert accepted > 0
    for usage, before in zip(usages, plain, strict=True):
        usage.pop("completion_tokens_details", None)
        del usage["prompt_tokens_details"], before["prompt_tokens_details"]  # whose engine had what
        assert usage == before
    if speculating.method == "draft_model":
        assert accepted > rejected / 3  # it knows no grammars and penalties
    assert re.search(r"endpoint=completions .* drafted=\d+ accepted=\d+", speculating.text)


def test_streams(server, speculating):
    """Several tokens at a time."""
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 40, "ignore_eos": True}
    expected = ok(server.post(CHAT, **body))["choices"][0]["message"]["content"]
    options = {"include_usage": True}
    events, text = [], ""
    with speculating.client.stream("POST", CHAT, json=body | {"stream": True, "stream_options": options}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                text += "".join(choice["delta"].get("content") or "" for choice in events[-1]["choices"])
    assert text == expected
    assert events[-1]["usage"]["completion_tokens"] == 40
    if speculating.method == "draft_model":
        assert len(events) < 30


def test_metrics(speculating):
    ok(speculating.post(COMPLETIONS, prompt="ab ab ab ab", max_tokens=20, temperature=0, ignore_eos=True))
    ok(speculating.post(COMPLETIONS, prompt="ab ab ab ab", max_tokens=20, temperature=0, ignore_eos=True))
    samples = {}
    for family in text_string_to_metric_families(speculating.client.get("/metrics").text):
        for sample in family.samples:
            samples[sample.name] = samples.get(sample.name, 0) + sample.value
    assert samples["pace_drafted_tokens_total"] >= samples["pace_accepted_tokens_total"]
    assert samples["pace_drafted_tokens_total"] >= samples["pace_verifications_total"] > 0
    assert samples["pace_proposing_seconds_total"] > 0
    assert samples["pace_speculation_speed_up"] > 0


@pytest.mark.parametrize("speculative", ['{"method": "ngram", "num_tokens": 4}', {"method": "ngram", "num_tokens": 4}])
def test_configuration(speculative):
    """As JSON on the command line, or as what stands in the file."""
    config = ServerConfig.of({"model": "m", "speculative": speculative})
    assert json.loads(config.speculative) == {"method": "ngram", "num_tokens": 4}
    assert yaml.safe_load(yaml.safe_dump(config.as_dict()))["speculative"] == config.speculative


@pytest.mark.parametrize(
    ("speculative", "words"),
    [
        ("ngram", "it must be such as"),
        ('{"method": "magic"}', "method of speculative is 'magic'; it must be draft_model, "),
        ('{"method": "pard"}', "the method pard needs the name of one"),
    ],
)
def test_what_can_not_be(speculative, words):
    with pytest.raises(ValueError, match=words):
        ServerConfig(model="m", speculative=speculative)


def test_a_draft_that_is_not_there(tiny, tmp_path):
    flag = '{"method": "draft_model", "model": "/nowhere/at/all"}'
    server = Server(tiny, "--engines", 1, "--speculative", flag, log=tmp_path / "log", wait=False)
    assert server.process.wait(60) != 0
    assert "no model '/nowhere/at/all'" in server.text
    assert "Traceback" not in server.text
