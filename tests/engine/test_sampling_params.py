"""What the fields of SamplingParams do, each against transformers where it has the same, and against the plain text."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from pace import LLM, ModelError, SamplingParams

from .fakes import EOS, FIRST_BYTE, VOCABULARY, byte_tokens, greedy, one, scripted, word, write_model

LOGPROB = 2e-4  # float32 logits of two implementations, within 3e-6 of values up to 30


# --- against transformers ---


@torch.no_grad()
def greedy_of(peer, prompt, processors, count):
    """Token by token: the largest of what the processors leave."""
    tokens = list(prompt)
    for _ in range(count):
        ids = torch.tensor([tokens])
        tokens.append(int(LogitsProcessorList(processors)(ids, peer(ids).logits[:, -1].float())[0].argmax()))
    return tokens[len(prompt) :]


PROMPT = byte_tokens("hello there")


def test_logit_bias(llm, peer):
    plain = one(llm, greedy(ignore_eos=True), PROMPT).token_ids
    bias = {plain[0]: -100.0, plain[1]: -1.5, 70: 2.5, 90: 1.0}
    made = one(llm, greedy(ignore_eos=True, logit_bias=bias), PROMPT).token_ids
    peers = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert made == greedy_of(peer, PROMPT, [peers], 40)
    assert made != plain


def test_bad_words(llm, peer):
    """Words of one token and of several, said after the prompt or begun in it."""
    plain = one(llm, greedy(ignore_eos=True), PROMPT)
    assert one(llm, greedy(ignore_eos=True, bad_words=["absent"]), PROMPT).token_ids == plain.token_ids
    text = llm.tokenizer.piece(plain.token_ids[0]) + b"".join(map(llm.tokenizer.piece, plain.token_ids[4:7]))
    words = [part for part in (text[:1].decode(errors="ignore"), "e" + "x", "STOP", "lo") if part.strip()]
    made = one(llm, greedy(ignore_eos=True, bad_words=words, logit_bias={FIRST_BYTE + 120: 3.0}), PROMPT).token_ids
    spellings = [list(tokens) for each in words for tokens in llm.engine.intake._spellings(each)]
    peers = [
        SequenceBiasLogitsProcessor([[[FIRST_BYTE + 120], 3.0]]),
        NoBadWordsLogitsProcessor(spellings, eos_token_id=torch.tensor([EOS])),
    ]
    assert made == greedy_of(peer, PROMPT, peers, 40)
    assert made != plain.token_ids


def test_bad_words_are_not_said(llm):
    scripted(llm, [*byte_tokens("no way, noo"), EOS])
    assert one(llm, greedy()).text == "no way, noo"
    assert one(llm, greedy(bad_words=["way"])).text == "no wax, noo"
    assert one(llm, greedy(bad_words=["no"])).text == "nx way, nxo"
    assert one(llm, greedy(bad_words=["wa", ","])).text == "no wxyx noo"


def test_min_tokens_is_min_new_tokens(llm, peer):
    plain = one(llm, greedy(ignore_eos=True), PROMPT).token_ids
    ends = sorted({plain[2], plain[5]})  # tokens that would come
    made = one(llm, greedy(stop_token_ids=ends, ignore_eos=True, min_tokens=12), PROMPT).token_ids
    banning = MinNewTokensLengthLogitsProcessor(len(PROMPT), 12, torch.tensor(ends))
    expected = greedy_of(peer, PROMPT, [banning], 40)
    stop = next((i for i, token in enumerate(expected) if token in ends), 39)
    assert made == expected[: stop + 1]
    assert len(made) > 12


def test_in_transformers_order(llm, peer):
    bias = {80: 4.0, 81: 4.0}
    params = greedy(ignore_eos=True, logit_bias=bias, repetition_penalty=1.6, bad_words=["wxyz"])
    peers = [
        SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
        RepetitionPenaltyLogitsProcessor(1.6),
        NoBadWordsLogitsProcessor([[word("wxyz")]], eos_token_id=torch.tensor([EOS])),
    ]
    assert one(llm, params, PROMPT).token_ids == greedy_of(peer, PROMPT, peers, 40)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1024, 7, 1])
def test_prompt_logprobs(directory, peer, chunk):
    llm = LLM(directory, kv_cache_bytes=4 << 20, max_batch_tokens=chunk)
    prompt = [*PROMPT, 70, 71, *range(20, 90)]
    output = llm.generate([prompt], greedy(prompt_logprobs=3, max_tokens=2))[0]
    expected = peer(torch.tensor([prompt])).logits[0].float().log_softmax(-1).numpy()
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for token, noted, row in zip(prompt[1:], output.prompt_logprobs[1:], expected, strict=False):
        order = np.argsort(-row, kind="stable").tolist()
        assert set(noted) == {token, *order[:3]}
        for id, logprob in noted.items():
            assert logprob.logprob == pytest.approx(row[id], abs=LOGPROB)
            assert logprob.rank == order.index(id) + 1
            assert logprob.decoded_token == llm.tokenizer.decode([id], skip_special_tokens=False)
    assert output.outputs[0].logprobs is None
    assert llm.generate([prompt], greedy(max_tokens=1))[0].prompt_logprobs is None
    assert llm.generate([[5]], greedy(prompt_logprobs=1))[0].prompt_logprobs == [None]


def test_prompt_logprobs_of_a_cached_prompt(directory):
    """Tokens that the cache has are computed again where their log-probabilities are asked for."""
    llm = LLM(directory, kv_cache_bytes=4 << 20, cache="PAGED", block_tokens=16)
    prompt = list(range(5, 75))
    first = llm.generate([prompt], greedy(prompt_logprobs=2))[0]
    again = llm.generate([prompt], greedy(prompt_logprobs=2))[0]
    cached = llm.generate([prompt], greedy())[0]
    assert (again.usage.cached_tokens, cached.usage.cached_tokens) == (0, 64)
    assert again.prompt_logprobs == first.prompt_logprobs
    assert first.outputs[0].token_ids == again.outputs[0].token_ids == cached.outputs[0].token_ids


# --- several texts ---


def test_n_texts_are_those_of_n_seeds(llm):
    params = {"temperature": 1.2, "max_tokens": 20, "ignore_eos": True, "seed": 7}
    three, again = (llm.generate([PROMPT], SamplingParams(**params, n=3))[0].outputs for _ in range(2))
    assert [text.token_ids for text in three] == [text.token_ids for text in again]
    assert [text.index for text in three] == [0, 1, 2]
    assert len({tuple(text.token_ids) for text in three}) == 3
    single = one(llm, SamplingParams(**params), PROMPT)
    assert three[0].token_ids == single.token_ids
    five = llm.generate([PROMPT], SamplingParams(**params, n=5))[0].outputs
    assert [text.token_ids for text in five[:3]] == [text.token_ids for text in three]
    unseeded = llm.generate([PROMPT], SamplingParams(temperature=1.2, max_tokens=20, n=2))[0].outputs
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_best_of_takes_the_most_probable(llm):
    params = {"temperature": 1.5, "max_tokens": 12, "seed": 3}
    all_of_them = llm.generate([PROMPT], SamplingParams(**params, n=6, logprobs=0))[0].outputs
    means = {tuple(text.token_ids): text.cumulative_logprob / len(text.token_ids) for text in all_of_them}
    best = sorted(means, key=lambda tokens: -means[tokens])[:2]
    result = llm.generate([PROMPT], SamplingParams(**params, n=2, best_of=6))[0]
    assert [tuple(text.token_ids) for text in result.outputs] == best
    assert [text.index for text in result.outputs] == [0, 1]
    assert result.outputs[0].cumulative_logprob is None  # nobody asked for it
    assert result.usage.completion_tokens == sum(map(len, means))
    with pytest.raises(ValueError, match="best_of is 6 of n 2: what is chosen at the end can't be streamed"):
        next(llm.stream(PROMPT, SamplingParams(**params, n=2, best_of=6)))


def test_a_stream_of_several_texts(llm):
    params = SamplingParams(temperature=1.2, n=3, seed=1, max_tokens=9)
    whole = llm.generate([PROMPT], params)[0]
    texts = ["", "", ""]
    for output in llm.stream(PROMPT, params):
        for i, text in enumerate(output.outputs):
            texts[i] += text.new_text
    assert texts == [text.text for text in whole.outputs]
    assert output.finished


def test_usage(llm):
    scripted(llm, [*byte_tokens("abc"), EOS])
    usage = llm.generate([[FIRST_BYTE]], greedy())[0].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.total_tokens) == (1, 4, 0, 5)


# --- the model's own values ---


def with_generation_config(path, **values):
    write_model(path)
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


OWN = {"temperature": 0.6, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2}


def test_what_is_not_said_is_the_models_own(tmp_path, llm):
    own = LLM(with_generation_config(tmp_path, **OWN), kv_cache_bytes=4 << 20)
    defaults = own.default_sampling_params
    assert {name: getattr(defaults, name) for name in OWN} == OWN
    said = {"seed": 5, "max_tokens": 30, "ignore_eos": True}
    expected = one(llm, SamplingParams(**OWN, **said), PROMPT).token_ids
    assert one(own, SamplingParams(**said), PROMPT).token_ids == expected
    assert one(own, None, PROMPT).token_ids != one(llm, None, PROMPT).token_ids
    # What the user says wins, also where it is the neutral value.
    neutral = SamplingParams(
        temperature=1, top_k=0, top_p=1, min_p=0, typical_p=1, repetition_penalty=1, seed=5, max_tokens=30
    )
    assert one(own, neutral, PROMPT).token_ids == one(llm, SamplingParams(seed=5, max_tokens=30), PROMPT).token_ids


def test_a_model_whose_own_values_cannot_be(tmp_path):
    with pytest.raises(ModelError, match=r"generation_config.json: top_p is 1.5; it must be above 0 and at most 1"):
        LLM(with_generation_config(tmp_path, top_p=1.5), kv_cache_bytes=4 << 20)


def test_ends_of_text_can_be_more_or_fewer_than_the_models(tmp_path):
    a, b = byte_tokens("ab")
    llm = LLM(with_generation_config(tmp_path, eos_token_id=[a, EOS]), kv_cache_bytes=4 << 20)
    scripted(llm, [*byte_tokens("xay"), EOS, *byte_tokens("bz")])

    def ends(**params):
        output = one(llm, greedy(max_tokens=6, **params))
        return output.text, output.stop_reason

    assert ends() == ("x", a)
    assert ends(eos_token_ids=[EOS]) == ("xay", EOS)  # narrower
    assert ends(eos_token_ids=[b]) == ("xay", b)  # another: the model's EOS is a token as any other
    assert ends(eos_token_ids=[]) == ("xaybz", None)
    assert ends(eos_token_ids=[EOS], ignore_eos=True) == ("xaybz", None)
    assert ends(eos_token_ids=[b], stop_token_ids=[EOS]) == ("xay", EOS)
    assert ends(eos_token_ids=[EOS], min_tokens=5)[0].startswith("xayx")


# --- bad input ---


@pytest.mark.parametrize(
    "params",
    [
        {"n": 0},
        {"n": 1.5},
        {"best_of": 0},
        {"typical_p": 0},
        {"typical_p": 1.1},
        {"logit_bias": [1, 2]},
        {"logit_bias": {5: "much"}},
        {"logit_bias": {3.7: 1.0}},
        {"ignore_eos": "no"},
        {"skip_special_tokens": None},
        {"include_stop_str_in_output": 1},
        {"logit_bias": {5: float("nan")}},
        {"logit_bias": {5: float("inf")}},
        {"logit_bias": {"five": 1.0}},
        {"bad_words": [""]},
        {"bad_words": [" "]},
        {"bad_words": [3]},
        {"eos_token_ids": [1.5]},
        {"eos_token_ids": 3},
        {"prompt_logprobs": -1},
        {"structured_outputs": "json"},
    ],
)
def test_bad_sampling_params(params):
    (name,) = params
    with pytest.raises(ValueError, match=f"{name} is .*; it must be"):
        SamplingParams(**params)


def test_best_of_is_at_least_n():
    with pytest.raises(ValueError, match="best_of is 2; it must be at least n, which is 3, or None"):
        SamplingParams(n=3, best_of=2)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"logit_bias": {VOCABULARY: 1.0}}, f"token {VOCABULARY} of logit_bias is outside the vocabulary"),
        ({"eos_token_ids": [VOCABULARY]}, f"token {VOCABULARY} of eos_token_ids is outside the vocabulary"),
        ({"prompt_logprobs": VOCABULARY + 1}, f"prompt_logprobs is {VOCABULARY + 1}; the vocabulary has"),
    ],
)
def test_what_the_model_does_not_have(llm, params, match):
    with pytest.raises(ValueError, match=match):
        llm.generate([[5]], greedy(**params))
    assert not llm.engine.busy


def test_priorities_for_each_prompt(llm):
    with pytest.raises(ValueError, match="there are 2 prompts and 1 priority; give one for each, or one for all"):
        llm.generate([[5], [6]], greedy(), priority=[1])
    assert len(llm.generate([[5], [6]], greedy(max_tokens=1), priority=[1, 0])) == 2


def test_a_bar_for_many_prompts(llm, capsys):
    llm.generate([[5], [6]], greedy(max_tokens=2), use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tok/s, cache" in shown
    llm.generate([[5], [6]], greedy(max_tokens=2))  # no terminal
    llm.generate([[5], [6]], greedy(max_tokens=2), use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_none_is_no_stop_and_no_bad_word():
    """What vLLM's users write for it."""
    params = SamplingParams(stop=None, stop_token_ids=None, bad_words=None)
    assert params == SamplingParams()


@pytest.mark.parametrize("name", ["temperature", "top_p", "frequency_penalty"])
def test_numbers_that_no_float_holds(name):
    with pytest.raises(ValueError, match=f"{name} is 1000"):
        SamplingParams(**{name: 10**400})
    with pytest.raises(ValueError, match="logit_bias is"):
        SamplingParams(logit_bias={5: 10**400})
