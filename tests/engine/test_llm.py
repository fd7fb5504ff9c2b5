"""`LLM` from outside: text, streams, endings, log-probabilities, penalties, and what it says to bad input."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import RepetitionPenaltyLogitsProcessor

from pace import LLM, ModelError, SamplingParams, kernels
from pace.cache import CACHES
from pace.engine.stopping import TextStream, overlap
from pace.ops import OperatorConfig, registry
from tests.kernels.arrays import BF16, F32

from .fakes import BOS, EOS, FIRST_BYTE, VOCABULARY, byte_tokens, greedy, one, scripted, word, write_model

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=40)


# --- streams and text ---

TEXT = "naïve 🎉🎉 👩‍👩‍👧 日本語 \n end"


def test_a_stream_is_generate_in_pieces(llm):
    scripted(llm, [*byte_tokens(TEXT), EOS])
    whole = one(llm, greedy(max_tokens=None))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (TEXT, "stop", EOS)
    outputs = list(llm.stream([FIRST_BYTE], greedy(max_tokens=None)))
    assert "".join(output.outputs[0].new_text for output in outputs) == TEXT
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, len(TEXT.encode()) + 2))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].outputs[0].text == TEXT
    for output in outputs:
        assert "\ufffd" not in output.outputs[0].text
    assert llm.cache.stats().used_bytes == 0


def test_half_a_character_at_the_end(llm):
    scripted(llm, byte_tokens("a🎉"))
    assert one(llm, greedy(max_tokens=3)).text == "a\ufffd"
    assert "".join(o.outputs[0].new_text for o in llm.stream([FIRST_BYTE], greedy(max_tokens=3))) == "a\ufffd"


def test_leaving_a_stream_early_frees_the_cache(llm):
    stream = llm.stream("hello", greedy(max_tokens=100, ignore_eos=True))
    next(stream)
    assert llm.cache.stats().used_bytes > 0
    stream.close()
    assert llm.cache.stats().used_bytes == 0
    assert not llm.engine.busy


def test_two_streams_at_a_time(llm):
    params = greedy(max_tokens=5, ignore_eos=True)
    expected = [one(llm, params, prompt).text for prompt in ([5, 6], [7, 8, 9])]
    streams = [llm.stream([5, 6], params), llm.stream([7, 8, 9], params)]
    texts = ["", ""]
    ends = [False, False]
    while streams[0] is not None or streams[1] is not None:
        for i, stream in enumerate(streams):
            if stream is None:
                continue
            output = next(stream, None)
            if output is None:
                streams[i] = None
                continue
            texts[i] += output.outputs[0].new_text
            ends[i] = output.finished
    assert texts == expected
    assert ends == [True, True]


def test_a_stream_beside_generate(llm):
    params = greedy(max_tokens=5, ignore_eos=True)
    expected = one(llm, params, [5, 6])
    stream = llm.stream([5, 6], params)
    outputs = [next(stream)]
    one(llm, greedy(max_tokens=20, ignore_eos=True), [9])
    outputs += stream
    assert "".join(output.outputs[0].new_text for output in outputs) == expected.text
    assert outputs[-1].finished


def test_a_leading_space_is_text(llm):
    scripted(llm, [word(" world"), EOS])
    assert one(llm, greedy()).text == " world"


def test_special_tokens_are_skipped_or_shown(llm):
    script = [word("hello"), BOS, word(" world"), VOCABULARY - 1, word("ab")]
    scripted(llm, script)
    assert one(llm, greedy(max_tokens=5)).text == "hello worldab"
    assert one(llm, greedy(max_tokens=5, skip_special_tokens=False)).text == "hello<s> worldab"


def test_prompts_as_text_and_as_tokens(llm):
    text, tokens, single = llm.generate("hi"), llm.generate([byte_tokens("hi")]), llm.generate(byte_tokens("hi"))
    assert text[0].prompt == "hi"
    assert tokens[0].prompt is None
    assert text[0].prompt_token_ids == tokens[0].prompt_token_ids == single[0].prompt_token_ids == byte_tokens("hi")
    assert len(llm.generate(["a", "b", [5]])) == 3
    assert llm.generate([]) == []
    for form in (np.array, torch.tensor):
        assert llm.generate(form(byte_tokens("hi")))[0].prompt_token_ids == byte_tokens("hi")
    numpy = llm.generate(np.array(byte_tokens("hi")), GREEDY)[0]
    assert numpy.outputs[0].token_ids == llm.generate("hi", GREEDY)[0].outputs[0].token_ids
    assert all(type(token) is int for token in numpy.prompt_token_ids)


# --- endings ---


def ends(llm, script, **params):
    output = one(scripted(llm, script), greedy(**params))
    return output.text, output.finish_reason, output.stop_reason


def test_end_of_text(llm):
    script = [*byte_tokens("abc"), EOS, *byte_tokens("def")]
    assert ends(llm, script) == ("abc", "stop", EOS)
    assert ends(llm, script, ignore_eos=True, max_tokens=7) == ("abcdef", "length", None)
    assert ends(llm, script, max_tokens=3) == ("abc", "length", None)
    assert ends(llm, script, min_tokens=6, max_tokens=7) == ("abcxdef", "length", None)
    assert ends(llm, script, min_tokens=3) == ("abc", "stop", EOS)
    assert ends(llm, script, min_tokens=4, max_tokens=5) == ("abcxd", "length", None)


def test_stop_tokens(llm):
    script = [*byte_tokens("abc"), EOS, word("hello"), *byte_tokens("d")]
    hello = word("hello")
    assert ends(llm, script, stop_token_ids=[hello]) == ("abc", "stop", EOS)
    text, *reason = ends(llm, script, stop_token_ids=[hello], ignore_eos=True)
    assert reason == ["stop", hello]
    assert text == "abc"
    text, *_ = ends(llm, script, stop_token_ids=[hello], ignore_eos=True, include_stop_str_in_output=True)
    assert text == "abchello"
    assert ends(llm, script, stop_token_ids=[hello], ignore_eos=True, min_tokens=6, max_tokens=6)[0] == "abcxd"


def test_the_token_that_ended_a_text_is_not_text_though_special_tokens_are_shown(llm):
    script = [*byte_tokens("abc"), EOS]
    assert ends(llm, script, skip_special_tokens=False) == ("abc", "stop", EOS)
    assert one(llm, greedy()).token_ids == script


@pytest.mark.parametrize(
    ("script", "stop", "before", "found"),
    [
        (byte_tokens("one STOP two"), "STOP", "one ", "STOP"),  # over four tokens
        ([*byte_tokens("a S"), word("STOP")], "STOP", "a S", "STOP"),  # a beginning that was none
        ([word("hello"), word("wxyz")], "xy", "hellow", "xy"),
        ([word("wxyz"), word("ab")], ["za", "wxyzab", "q"], "", "wxyzab"),  # the first, the longer of two
        ([word("STOP"), word("OPS")], ["OP", "TOPO"], "ST", "OP"),
        (byte_tokens("x🎉y"), "🎉", "x", "🎉"),
        (byte_tokens("ababac"), "abac", "ab", "abac"),
        ([*byte_tokens("hellO"), word("STOP")], "OST", "hell", "OST"),
    ],
)
def test_stop_strings(llm, script, stop, before, found):
    assert ends(llm, script, stop=stop) == (before, "stop", found)
    assert ends(llm, script, stop=stop, include_stop_str_in_output=True) == (before + found, "stop", found)
    pieces = [o.outputs[0].new_text for o in llm.stream([FIRST_BYTE], greedy(stop=stop))]
    assert "".join(pieces) == before  # nothing of the stop string was shown on the way
    assert llm.cache.stats().used_bytes == 0


def test_a_stop_string_that_never_came_is_text(llm):
    assert ends(llm, [*byte_tokens("a STO"), EOS], stop="STOP") == ("a STO", "stop", EOS)
    assert ends(llm, byte_tokens("a STO"), stop="STOP", max_tokens=5) == ("a STO", "length", None)


def test_max_tokens_none_goes_to_the_end_of_the_context(directory):
    llm = LLM(directory, kv_cache_bytes=8 << 20)
    output = one(llm, greedy(max_tokens=None, ignore_eos=True), [5] * 500)
    assert (len(output.token_ids), output.finish_reason) == (12, "length")
    output = one(llm, greedy(max_tokens=10**9, ignore_eos=True), [5] * 500)
    assert len(output.token_ids) == 12


def test_max_tokens_none_goes_to_the_end_of_the_cache(directory, llm):
    per_token = llm.model.cache_shape.bytes_per_token
    block = llm.cache.tokens_needed(1)
    small = LLM(directory, kv_cache_bytes=block * per_token)
    if block < 512:
        output = one(small, greedy(max_tokens=None, ignore_eos=True), [5, 6])
        assert len(output.token_ids) == block - 2
        assert output.token_ids[:40] == one(llm, greedy(ignore_eos=True), [5, 6]).token_ids


def test_metrics(llm):
    metrics = llm.generate("hi")[0].metrics
    assert metrics.arrived <= metrics.first_token <= metrics.finished


# --- text streams against an oracle ---

PIECES = st.lists(st.sampled_from(["a", "b", "ab", "ba", "🎉", "aab", ""]), max_size=12)
STOPS = st.lists(st.text("ab🎉", min_size=1, max_size=4), max_size=3)


class Bytes:
    """A detokenizer whose tokens are bytes of the text, in pieces."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token):
        return self.pieces[token]

    def flush(self):
        return ""


def stopped(pieces, stops):
    """Where a text that grows piece by piece stops first: at its leftmost stop string, of those the longest."""
    text = ""
    for number, piece in enumerate(pieces):
        text += piece
        found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
        if found:
            return number + 1, text, min(found)
    return len(pieces), text, None


@given(pieces=PIECES, stops=STOPS, include=st.booleans())
def test_text_stream(pieces, stops, include):
    stream = TextStream(Bytes(pieces), stops, include)
    count, text, found = stopped(pieces, stops)
    shown = []
    for token in range(count):
        assert stream.stopped_by is None
        stream.push(token)
        shown.append(stream.text)
    stream.finish()
    expected = text if found is None else text[: found[0]] + (found[2] if include else "")
    assert (stream.text, stream.stopped_by) == (expected, found and found[2])
    for earlier in shown:
        assert stream.text.startswith(earlier)  # what was shown is never taken back
    if not stops:
        assert shown == ["".join(pieces[: i + 1]) for i in range(count)]  # and nothing is held without need


@given(text=st.text("ab", max_size=8), stop=st.text("ab", min_size=1, max_size=6))
def test_overlap(text, stop):
    whole = [n for n in range(len(stop)) if n <= len(text) and text[len(text) - n :] == stop[:n]]
    assert overlap(text, stop) == max(whole)


# --- numbers ---


@torch.no_grad()
def peer_logits(peer, tokens):
    return peer(torch.tensor([tokens])).logits[0].float()


def test_logprobs_are_transformers(llm, peer):
    prompt = byte_tokens("hello there")
    # Of the unmodified distribution, whatever is drawn from.
    params = SamplingParams(
        temperature=0.7, top_k=5, seed=3, repetition_penalty=1.2, logprobs=4, max_tokens=12, ignore_eos=True
    )
    output = one(llm, params, prompt)
    expected = peer_logits(peer, prompt + output.token_ids).log_softmax(-1)[len(prompt) - 1 : -1].numpy()
    assert len(output.logprobs) == 12
    for token, logprobs, row in zip(output.token_ids, output.logprobs, expected, strict=True):
        order = np.argsort(-row, kind="stable").tolist()
        assert set(logprobs) == {token, *order[:4]}
        for id, logprob in logprobs.items():
            assert logprob.logprob == pytest.approx(row[id], abs=2e-4)
            assert logprob.rank == order.index(id) + 1
            assert logprob.decoded_token == llm.tokenizer.decode([id], skip_special_tokens=False)
    chosen = [row[token] for token, row in zip(output.token_ids, expected, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen), abs=2e-3)


def test_logprobs_as_many_as_each_asked_for(llm):
    params = [greedy(logprobs=n, max_tokens=2, ignore_eos=True) for n in (None, 0, 5, VOCABULARY)]
    outputs = [result.outputs[0] for result in llm.generate(["ab"] * 4, params)]
    assert outputs[0].logprobs is None
    assert outputs[0].cumulative_logprob is None
    assert [[len(place) for place in output.logprobs] for output in outputs[1:]] == [[1, 1], [5, 5], [VOCABULARY] * 2]


def test_repetition_penalty_is_transformers(llm, peer):
    prompt = byte_tokens("abcabc")
    made = one(llm, greedy(repetition_penalty=1.4, ignore_eos=True), prompt).token_ids
    ids = torch.tensor([prompt])
    expected = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=1.4,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert made == expected[0, len(prompt) :].tolist()
    assert made != one(llm, greedy(ignore_eos=True), prompt).token_ids


@pytest.mark.parametrize("penalties", [(0.6, 0.0), (0.0, 1.1), (0.3, 0.4), (-0.5, 0.0)])
def test_frequency_and_presence_penalties(llm, peer, penalties):
    """vLLM's: of what was said, not of the prompt."""
    frequency, presence = penalties
    prompt = byte_tokens("abcabc")
    params = greedy(frequency_penalty=frequency, presence_penalty=presence, repetition_penalty=1.1, ignore_eos=True)
    made = one(llm, params, prompt).token_ids
    rows = peer_logits(peer, prompt + made)[len(prompt) - 1 :]
    for step, token in enumerate(made):
        logits = RepetitionPenaltyLogitsProcessor(1.1)(torch.tensor([prompt + made[:step]]), rows[step : step + 1])[0]
        counts = torch.bincount(torch.tensor(made[:step], dtype=torch.long), minlength=VOCABULARY)
        logits = logits - frequency * counts - presence * (counts > 0)
        assert token == int(logits.argmax())


def test_reference_operators_say_the_same(directory, llm):
    reference = LLM(directory, kv_cache_bytes=4 << 20, operators="REFERENCE")
    prompts = ["hello", [5] * 70, "ab"]
    params = greedy(ignore_eos=True)
    texts = [[result.outputs[0].token_ids for result in each.generate(prompts, params)] for each in (llm, reference)]
    assert texts[0] == texts[1]


def test_every_function_of_reference_operators_is_the_reference(directory, monkeypatch):
    """Packing and sampling too: on REFERENCE nothing native runs."""
    registry.resolve.cache_clear()

    def native(name):
        raise AssertionError(f"{name} is native")

    for operator, names in registry.OPERATORS.items():
        registration = registry.Registration({name: partial(native, name) for name in names}, (F32, BF16), True)
        monkeypatch.setitem(registry._registry, (operator, "NATIVE"), registration)
    for name in kernels.OPERATIONS:
        monkeypatch.setattr(kernels, name, partial(native, name))
    try:
        reference = LLM(directory, kv_cache_bytes=4 << 20, operators="REFERENCE")
        assert len(one(reference, SamplingParams(max_tokens=3, ignore_eos=True)).token_ids) == 3
    finally:
        registry.resolve.cache_clear()


def in_the_reference(smollm2, max_tokens):
    """SmolLM2's sentence of a process on the reference rung."""
    code = f"""
from pace import LLM, SamplingParams, isa
assert isa.RUNG == "reference"
llm = LLM({str(smollm2)!r}, dtype="float32", kv_cache_bytes=64 << 20)
params = SamplingParams(temperature=0, max_tokens={max_tokens})
print(llm.generate({SENTENCE!r}, params)[0].outputs[0].token_ids)
"""
    environment = {**os.environ, "PACE_ISA": "reference"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


SENTENCE = "Once upon a time, there was a little girl named"


def test_smollm2_on_the_reference_rung(smollm2):
    llm = LLM(smollm2, dtype="float32", kv_cache_bytes=64 << 20)
    output = llm.generate(SENTENCE, greedy(max_tokens=6))[0].outputs[0]
    assert output.text.startswith(" Emma who")
    assert in_the_reference(smollm2, 6) == output.token_ids


@pytest.mark.slow
def test_smollm2_on_the_reference_rung_for_longer(smollm2):
    llm = LLM(smollm2, dtype="float32", kv_cache_bytes=64 << 20)
    output = llm.generate(SENTENCE, greedy(max_tokens=32))[0].outputs[0]
    assert in_the_reference(smollm2, 32) == output.token_ids


# --- bad input ---


def assert_refused(error, match, call, *args, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ([], {}, "the prompt is empty: give at least one token"),
        ("", {}, "the prompt is empty: give at least one token"),
        ([VOCABULARY], {}, f"token {VOCABULARY} of the prompt is outside the vocabulary of {VOCABULARY}"),
        ([-1], {}, "token -1 of the prompt is outside"),
        ([5] * 512, {}, "the prompt has 512 tokens; the model's context is 512: shorten it"),
        ([5], {"logprobs": VOCABULARY + 1}, f"logprobs is {VOCABULARY + 1}; the vocabulary has {VOCABULARY} tokens"),
        ([5], {"stop_token_ids": [VOCABULARY]}, f"token {VOCABULARY} of stop_token_ids is outside the vocabulary"),
        ([5], {"stop_token_ids": [-1], "min_tokens": 3}, "token -1 of stop_token_ids is outside the vocabulary"),
        ([5.5], {}, "token 5.5 of the prompt is outside"),
        ([np.int64(VOCABULARY)], {}, f"token {VOCABULARY} of the prompt is outside"),
        (np.ones((2, 2), int), {}, r"token \[1, 1\] of the prompt is outside"),
    ],
)
def test_bad_requests(llm, prompt, params, match):
    good = [5, 6]
    error = (ValueError, TypeError)
    assert_refused(error, match, llm.generate, [good, prompt], [greedy(), greedy(**params)])
    assert_refused(error, match, list, llm.stream(prompt, greedy(**params)))
    assert not llm.engine.busy  # nor does the good prompt wait
    assert llm.cache.stats().used_bytes == 0


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda ids: [np.int32(token) for token in ids]])
def test_prompts_of_any_kind_of_integers(llm, form):
    expected = llm.generate([[5, 6, 7]], GREEDY)[0]
    result = llm.generate([form([5, 6, 7])], GREEDY)[0]
    assert result.outputs[0].token_ids == expected.outputs[0].token_ids
    assert result.prompt_token_ids == [5, 6, 7]
    assert {type(token) for token in result.prompt_token_ids} == {int}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1e39},
        {"top_k": -2},
        {"top_k": 2**31},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"typical_p": 0},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-50},
        {"repetition_penalty": 1e39},
        {"frequency_penalty": 3},
        {"presence_penalty": float("inf")},
        {"max_tokens": 0},
        {"min_tokens": 17},
        {"stop": [""]},
        {"seed": -1},
        {"logprobs": -1},
        {"stop": [3]},
        {"stop": 3},
        {"seed": 1.5},
        {"seed": "1"},
        {"top_k": 2.0},
        {"max_tokens": 3.5},
        {"max_tokens": True},
        {"min_tokens": "1"},
        {"logprobs": 1.0},
        {"stop_token_ids": [1.5]},
        {"stop_token_ids": 3},
        {"temperature": "1"},
        {"top_p": "0.5"},
        {"min_p": 1j},
    ],
)
def test_bad_sampling_params(params):
    (name,) = params
    assert_refused(ValueError, f"{name} is .*; it must be", SamplingParams, **params)


def test_sampling_params_of_numpy_numbers():
    numbers = {"temperature": np.float32(0.5), "seed": np.int64(3), "max_tokens": np.int32(4), "logprobs": np.uint8(2)}
    params = SamplingParams(**numbers, stop_token_ids=np.array([5, 6]))
    assert params == SamplingParams(temperature=0.5, seed=3, max_tokens=4, logprobs=2, stop_token_ids=(5, 6))
    assert {type(value) for value in (params.seed, params.max_tokens, *params.stop_token_ids)} == {int}


def test_as_many_params_as_prompts(llm):
    assert_refused(ValueError, "there are 2 prompts and 1 sampling_params", llm.generate, ["a", "b"], [GREEDY])


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_is_too_small(directory, name):
    make = partial(LLM, directory, cache=name)
    large = make(kv_cache_bytes=4 << 20)
    block_bytes = large.cache.tokens_needed(1) * large.model.cache_shape.bytes_per_token
    assert_refused(ValueError, f"kv_cache_bytes is 100; one block .* takes {block_bytes}", make, kv_cache_bytes=100)
    small = make(kv_cache_bytes=block_bytes)
    block = small.cache.tokens_needed(1)
    if block < 512:
        prompt, needed = [5] * block, 2 * block_bytes
        assert_refused(
            ValueError, f"do not fit the cache's {block}: give kv_cache_bytes of {needed}", small.generate, [prompt]
        )
        assert len(one(make(kv_cache_bytes=needed), greedy(max_tokens=1), prompt).token_ids) == 1


def test_bad_arguments(directory):
    assert_refused(ValueError, "dtype is 'float64'; it must be auto", LLM, directory, dtype="float64")
    assert_refused(
        ValueError, "cache is 'NONE'; it must be SLAB_POOL, PAGED, BMC, DYNAMIC", LLM, directory, cache="NONE"
    )
    for block_tokens in (0, 24, -16):
        assert_refused(ValueError, f"block_tokens is {block_tokens}; it", LLM, directory, block_tokens=block_tokens)
    assert_refused(ValueError, "operator 'nrom' is unknown", LLM, directory, operators={"nrom": "NATIVE"})


@pytest.fixture
def broken(tmp_path):
    """A copy to break: change(tensors=…, config=…) edits what is on disk."""
    write_model(tmp_path)

    def change(tensors=None, **config):
        file, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
        if tensors:
            stored = load_file(file)
            tensors(stored)
            save_file(stored, file)
        if config:
            settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
        return tmp_path

    return change


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def test_missing_tensors(broken):
    path = broken(lambda stored: stored.pop(UP))
    assert_refused(ModelError, f"and its config.json do not fit: tensor {UP} is not there. Download both", LLM, path)


def test_extra_tensors(broken):
    path = broken(lambda stored: stored.update(extra=np.zeros(3, np.float32)))
    assert_refused(ModelError, "do not fit: extra is not of this model_type", LLM, path)
    path = broken(lambda stored: stored.pop("extra"), attention_bias=True)
    biases = "; ".join(f"tensor model.layers.0.self_attn.{which}_proj.bias is not there" for which in "qkv")
    assert_refused(ModelError, f"do not fit: {biases}; and 5 more tensors", LLM, path)


def test_an_absurd_context_takes_no_memory(broken, llm):
    endless = LLM(broken(max_position_embeddings=10**13), kv_cache_bytes=4 << 20)
    assert one(endless, GREEDY).token_ids == one(llm, GREEDY).token_ids


@pytest.mark.parametrize("size", ["intermediate_size", "vocab_size", "hidden_size"])
def test_absurd_sizes_take_no_memory(broken, size):
    path = broken(**{size: 10**13, "num_attention_heads": 6, "head_dim": 24})
    assert_refused(ModelError, r"\.weight has shape \(.*\), and config.json makes it \(", LLM, path)


def test_only_nan_is_called_nan(directory, monkeypatch):
    def other(*_):
        raise ValueError("weight has shape (1, 2)")

    operators = SimpleNamespace(pack_linear=other)
    monkeypatch.setattr(OperatorConfig, "resolve", lambda *_, **__: operators)
    assert_refused(ValueError, r"^weight has shape \(1, 2\)", LLM, directory)


def test_tables_that_are_computed_are_not_extra(broken):
    LLM(broken(lambda stored: stored.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(12, np.float32)})))


@pytest.mark.parametrize("name", [UP, NORM, "model.embed_tokens.weight", "lm_head.weight"])
def test_tensors_of_another_shape(broken, name):
    def cut(stored):
        stored[name] = stored[name][:-1].copy()

    assert_refused(ModelError, rf"{name} has shape \(.*\), and config.json makes it \(", LLM, broken(cut))


@pytest.mark.parametrize("name", [UP, NORM, "model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"])
def test_nan_in_weights(broken, name):
    def poison(stored):
        stored[name].flat[-1] = np.nan

    path = broken(poison)
    for dtype in ("float32", "bfloat16"):
        assert_refused(ModelError, f"{name.rsplit('.', 1)[0]}.* holds NaN: the file is damaged", LLM, path, dtype=dtype)


@pytest.mark.parametrize("name", [UP, NORM, "model.layers.0.self_attn.k_proj.weight"])
def test_weights_of_a_dtype_that_is_no_weight(broken, name):
    def convert(stored):
        stored[name] = stored[name].astype(np.int8)

    assert_refused(ModelError, f"{name} .*int8", LLM, broken(convert))


def test_float64_weights(broken, llm):
    def widen(stored):
        stored.update({name: array.astype(np.float64) for name, array in stored.items()})

    assert one(LLM(broken(widen), dtype="float32"), GREEDY).token_ids == one(llm, GREEDY).token_ids


def test_cut_short_and_corrupt(broken):
    file = broken() / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b"\xff" * 100, whole[:8] + b"\0" * 100 + whole[108:]):
        file.write_bytes(content)
        assert_refused(ModelError, "model.safetensors is corrupt or cut short", LLM, file.parent)


def test_no_config(broken):
    (broken() / "config.json").unlink()
    assert_refused(ModelError, "has no config.json: give", LLM, broken())


def test_no_tokenizer(broken):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken() / name).unlink()
    assert_refused(
        ModelError, "has no tokenizer.json", LLM, broken(intermediate_size=137)
    )  # said before any weight is read


def test_no_such_model(tmp_path):
    assert_refused(ModelError, "nothing", LLM, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "mamba"}, "model_type in .* is 'mamba'; supported are .*llama"),
        ({"model_type": None}, "model_type in .* is None; supported are .*llama"),
        ({"hidden_size": "64"}, "hidden_size in config.json is '64'; it must be a positive integer"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads in config.json is 0"),
        ({"num_key_value_heads": 4}, "num_key_value_heads in config.json is 4; .* num_attention_heads 6"),
        ({"head_dim": 25}, "head_dim in config.json is 25; it must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps in config.json is 'small'; it must be a number"),
        ({"hidden_act": "mish"}, "hidden_act in config.json is 'mish'; supported are silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings in config.json is 'yes'; it must be true or false"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor in config.json is 1.5; it must be a number in"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": "half"}},
            "partial_rotary_factor in config.json is 'half'",
        ),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type is 'ntk'; .* default, linear, .* yarn, longrope"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "has factor None; rope_type yarn needs a number above 0"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1, 2], "long_factor": [1]}},
            r"has short_factor \[1, 2\]; longrope needs \d+ numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_parameters in config.json has factor None; rope_type linear needs",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
            "rope_parameters in config.json has low_freq_factor None",
        ),
    ],
)
def test_bad_configurations(broken, config, match):
    assert_refused(ModelError, match, LLM, broken(**config))
