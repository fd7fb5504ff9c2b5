"""Text that follows a grammar: every token drawn is one that the grammar allows, and what comes out parses."""

import dataclasses
import json
import re

import llguidance
import numpy as np
import pytest

from pace import LLM, SamplingParams, StructuredOutputsParams
from pace.engine.structured import Grammars

from .fakes import EOS, FIRST_BYTE, VOCABULARY, byte_tokens, scripted

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def allowed(matcher):
    mask = np.zeros(-(-VOCABULARY // 32), np.int32)
    matcher.allow(mask)
    return {token for token in range(VOCABULARY) if mask[token // 32] >> (token % 32) & 1}


def texts(llm, count=6, **structure):
    """Random texts: the model is random, so only the grammar makes them what they are."""
    params = [
        SamplingParams(
            temperature=1.5, seed=seed, max_tokens=200, structured_outputs=StructuredOutputsParams(**structure)
        )
        for seed in range(count)
    ]
    outputs = [result.outputs[0] for result in llm.generate([[5 + i] for i in range(count)], params)]
    assert llm.cache.stats().used_bytes == 0
    return outputs


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["mapping", "text"])
def test_json_schema(llm, schema):
    for output in texts(llm, json=schema):
        assert output.finish_reason == "stop"
        found = json.loads(output.text)
        assert set(found) == set(SCHEMA["required"])
        assert isinstance(found["name"], str)
        assert 0 <= found["age"] <= 150
        assert set(found["tags"]) <= {"a", "b"}
        assert len(found["tags"]) <= 3


def test_json_object(llm):
    params = StructuredOutputsParams(json_object=True)
    assert dataclasses.replace(params) == params
    ended = [output for output in texts(llm, json_object=True) if output.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(output.text), dict) for output in ended)


def test_regex(llm):
    for output in texts(llm, regex=r"[a-f]{2,5}-[0-9]{3}"):
        assert re.fullmatch(r"[a-f]{2,5}-[0-9]{3}", output.text)


def test_choice(llm):
    choices = ["yes", "no", 'say "maybe"', "naïve 🎉"]
    found = {output.text for output in texts(llm, count=24, choice=choices)}
    assert found <= set(choices)
    assert len(found) > 1


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= item ("," item)*\nitem ::= [0-9] | "x" item "y"',
        'start: item ("," item)*\nitem: /[0-9]/ | "x" item "y"',
    ],
    ids=["GBNF", "Lark"],
)
def test_grammars(llm, grammar):
    def item(text):
        return bool(re.fullmatch("[0-9]", text)) or (text[:1] == "x" and text[-1:] == "y" and item(text[1:-1]))

    ended = [output.text for output in texts(llm, count=12, grammar=grammar) if output.finish_reason == "stop"]
    assert ended
    assert all(all(map(item, text.split(","))) for text in ended)


def test_a_grammar_and_everything_else(llm):
    """Beside penalties and bans, in a batch with others, in the same step: each as alone."""
    structure = StructuredOutputsParams(json=SCHEMA)
    params = [
        SamplingParams(temperature=1.2, seed=1, max_tokens=60, structured_outputs=structure, logprobs=3),
        SamplingParams(temperature=1.2, seed=1, max_tokens=60, logprobs=3),
        SamplingParams(
            temperature=1.2, seed=2, max_tokens=60, structured_outputs=structure, repetition_penalty=1.2, n=2, top_p=0.9
        ),
    ]
    together = llm.generate([[5]] * 3, params)
    apart = [llm.generate([[5]], each)[0] for each in params]
    for one, other in zip(together, apart, strict=True):
        assert [(t.token_ids, t.logprobs, t.text) for t in one.outputs] == [
            (t.token_ids, t.logprobs, t.text) for t in other.outputs
        ]
    assert re.match(r'\{\s{0,16}"name"', together[0].outputs[0].text)
    assert not together[1].outputs[0].text.startswith("{")


def test_no_token_is_drawn_that_the_grammar_does_not_allow(llm):
    """Against llguidance's own answer, token by token."""
    structure = StructuredOutputsParams(regex="(ab|STOP|wxyz){1,4}!")
    output = texts(llm, count=1, regex=structure.regex)[0]
    matcher = llm.engine.intake._matcher(SamplingParams(structured_outputs=structure))
    for token in output.token_ids:
        assert token in allowed(matcher)
        matcher.accept(token)
    assert matcher.complete


def test_where_a_grammar_ends(llm):
    """Where nothing can follow the text is over; where something could, it is the model that ends it."""
    say = byte_tokens("abab")
    scripted(llm, [*say, EOS])
    params = {"temperature": 0, "max_tokens": 20}
    closed = StructuredOutputsParams(regex="abab")
    output = llm.generate([[FIRST_BYTE]], SamplingParams(**params, structured_outputs=closed))[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason, len(output.token_ids)) == ("abab", "stop", None, 4)
    opened = StructuredOutputsParams(regex="(ab)+")
    output = llm.generate([[FIRST_BYTE]], SamplingParams(**params, structured_outputs=opened))[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("abab", "stop", EOS)


def test_a_dead_end_ends_its_request_alone(llm):
    """All that the grammar allows is banned."""
    structure = StructuredOutputsParams(choice=["q"])
    banned = SamplingParams(temperature=0, structured_outputs=structure, bad_words=["q"], max_tokens=5)
    fine = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    dead, alive = llm.generate([[5], [5]], [banned, fine])
    assert dead.outputs[0].finish_reason == "error"
    assert "leave no token to draw" in dead.outputs[0].stop_reason
    assert alive.outputs[0].finish_reason == "length"
    assert llm.cache.stats().used_bytes == 0


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(llm, monkeypatch):
    structure = StructuredOutputsParams(regex="a{10}")
    request = llm.engine.intake.request([5], SamplingParams(structured_outputs=structure, max_tokens=20))
    other = llm.engine.intake.request([5], SamplingParams(max_tokens=4, ignore_eos=True))

    def failing(_):
        raise ValueError("the grammar: too many states")

    monkeypatch.setattr(request.sequences[0].matcher, "allow", failing)
    for each in (request, other):
        llm.engine.add(each)
    while llm.engine.busy:
        llm.engine.step()
    output = request.output().outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("error", "the grammar: too many states")
    assert other.output().outputs[0].finish_reason == "length"


def test_special_tokens_are_not_text(llm):
    """A pattern that any character fits allows no token that is only a sign to the model."""
    matcher = llm.engine.intake._matcher(SamplingParams(structured_outputs=StructuredOutputsParams(regex="(?s:.){3}")))
    assert not allowed(matcher) & {0, 1, EOS}
    assert allowed(matcher) >= set(byte_tokens("xyz"))


@pytest.mark.parametrize(
    ("structure", "match"),
    [
        ({}, "structured_outputs has nothing; give exactly one of json, json_object, regex, choice, grammar"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs has regex and choice; give exactly one"),
        ({"json": "{"}, "json is no JSON schema"),
        ({"json": "[]"}, r"json is \[\]; it must be a JSON schema, an object"),
        ({"json": {"enum": [object()]}}, "json is no JSON schema"),
        ({"choice": []}, r"choice is \[\]; it must be strings that are not empty"),
        ({"choice": "yes"}, "choice is 'yes'; it must be strings"),
        ({"choice": ["a", ""]}, "choice is .* it must be strings that are not empty"),
        ({"regex": 3}, "regex is 3; it must be a text"),
        ({"grammar": ["root"]}, "grammar is .*; it must be a text"),
    ],
)
def test_bad_structures(structure, match):
    with pytest.raises(ValueError, match=match):
        StructuredOutputsParams(**structure)


@pytest.mark.parametrize(
    ("structure", "match"),
    [
        ({"regex": "["}, "structured_outputs can't be followed: .*unclosed character class"),
        ({"json": {"type": "nonsense"}}, "structured_outputs can't be followed: .*nonsense"),
        ({"grammar": "root ::= missing"}, "structured_outputs can't be followed: .*missing"),
        ({"grammar": "what is this"}, "structured_outputs can't be followed: "),
    ],
)
def test_what_is_no_grammar_is_refused_before_it_runs(llm, structure, match):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**structure))
    with pytest.raises(ValueError, match=match) as caught:
        llm.generate([[5]], params)
    assert "\n" not in str(caught.value)
    assert not llm.engine.busy


def test_a_grammar_is_compiled_once(llm, monkeypatch):
    compiled, original = [], llguidance.LLMatcher

    def counted(*args, **kwargs):
        compiled.append(args)
        return original(*args, **kwargs)

    counted.grammar_from_json_schema = original.grammar_from_json_schema
    monkeypatch.setattr(llguidance, "LLMatcher", counted)
    grammars = Grammars(llm.tokenizer, VOCABULARY, frozenset({EOS}))
    for _ in range(3):
        grammars.matcher(StructuredOutputsParams(json=SCHEMA))
        grammars.matcher(StructuredOutputsParams(regex="a+"))
    assert len(compiled) == 2


def test_a_real_vocabulary(smollm2):
    llm = LLM(smollm2, kv_cache_bytes=64 << 20)
    question = [{"role": "user", "content": "Invent a person: name, age and up to three tags of a and b, as JSON."}]
    params = SamplingParams(temperature=0, max_tokens=80, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    found = json.loads(llm.chat(question, params)[0].outputs[0].text)
    assert set(found) == set(SCHEMA["required"])
