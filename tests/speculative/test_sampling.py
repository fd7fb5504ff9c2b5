"""What is drawn with drafts has the distribution of what is drawn without: the very tokens, and chi-square of many."""

import numpy as np
import pytest

from pace import SamplingParams
from pace.engine.sequence import Sequence
from tests.engine.fakes import FIRST_BYTE, VOCABULARY, Scripted
from tests.engine.test_scheduling import run

from .conftest import PARD_TOKEN
from .proposers import draft_of, make_engine

DRAWS = 600
TOKENS = 5
LETTERS = FIRST_BYTE + np.arange(97, 103)
# Of a chi-square with so many degrees of freedom, the value that one in 10^6 is above; the seeds are fixed.
MOST = {5: 36.0, 30: 84.0}


class Dice(Scripted):
    """Each next token is one of six letters, with probabilities that follow the one before; a draft's are others."""

    def __init__(self, dtype, seed):
        super().__init__([0], dtype)
        self.logits_after = np.random.default_rng(seed).normal(0, 1.5, (VOCABULARY, 6)).astype(np.float32)

    def forward(self, tokens, placement, cache):
        return tokens.astype(np.float32)[:, None]

    def logits(self, hidden):
        logits = np.full((len(hidden), VOCABULARY), -np.inf, np.float32)
        logits[:, LETTERS] = self.logits_after[hidden[:, 0].astype(int)]
        return logits

    def probabilities(self, before, temperature):
        weights = np.exp(self.logits_after[before].astype(np.float64) / temperature)
        return weights / weights.sum(axis=-1, keepdims=True)


class Stand:
    """What stands in for an LLM."""

    def __init__(self, model, llm):
        self.model, self.tokenizer = model, llm.tokenizer


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


SPECULATIVE = {
    "alike": ({"method": "draft_model", "model": "d", "num_tokens": 3}, 1),
    "unlike": ({"method": "draft_model", "model": "d", "num_tokens": 3}, 2),
    "pard": ({"method": "pard", "model": "d", "num_tokens": 4}, 2),
    "ngram": ({"method": "ngram", "num_tokens": 3, "shortest": 1}, None),
    "liar": ({"method": "liar", "num_tokens": 3}, None),
}


@pytest.mark.parametrize("method", SPECULATIVE)
def test_distribution(llm, method):
    """Of every place and of pairs of neighbours, over many seeds; without drafts the same seeds give the same."""
    config, seed = SPECULATIVE[method]
    target = Stand(Dice(llm.model.dtype, 1), llm)
    draft = None if seed is None else draft_of(Stand(Dice(llm.model.dtype, seed), llm), pard_token=PARD_TOKEN)
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=TOKENS, ignore_eos=True) for i in range(DRAWS)]
    texts = []
    for speculative in ({"adaptive": False} | config, None):
        engine = make_engine(target, "SLAB_POOL", 1 << 12, speculative=speculative, draft=draft, block_tokens=32)
        requests = [engine.intake.request([int(LETTERS[0])], each) for each in params]
        run(engine, requests)
        texts.append(np.array([request.sequences[0].token_ids for request in requests]))
        if speculative is not None:
            stats = engine.stats().speculation
            assert stats.accepted > 0 or method == "liar"
            assert method != "alike" or stats.acceptance_rate > 0.99
    assert np.array_equal(*texts)

    before = np.full(DRAWS, LETTERS[0])
    chances = target.model.probabilities(LETTERS, 0.9)
    expected = target.model.probabilities(LETTERS[0], 0.9)
    for place in range(TOKENS):
        drawn = np.bincount(texts[0][:, place] - LETTERS[0], minlength=6)
        assert chi_square(drawn, DRAWS * expected) < MOST[5]
        if place:
            pairs = np.zeros((6, 6))
            np.add.at(pairs, (before - LETTERS[0], texts[0][:, place] - LETTERS[0]), 1)
            assert chi_square(pairs, pairs.sum(axis=1, keepdims=True) * chances) < MOST[30]
        before = texts[0][:, place]
        expected = expected @ chances


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_numbers_that_the_target_draws_with_are_better_guesses(llm, temperature):
    """A draft that is drawn as the target draws is right more often than the most probable token is."""
    target, draft = Dice(llm.model.dtype, 1), Dice(llm.model.dtype, 1)
    draft.logits_after = target.logits_after + np.random.default_rng(3).normal(0, 0.3, target.logits_after.shape)
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=30, ignore_eos=True) for i in range(40)]
    config = {"method": "draft_model", "model": "d", "num_tokens": 1, "adaptive": False}
    engine = make_engine(
        Stand(target, llm), "SLAB_POOL", 1 << 12, speculative=config, draft=draft_of(Stand(draft, llm))
    )
    requests = [engine.intake.request([int(LETTERS[0])], each) for each in params]
    run(engine, requests)
    text = np.array([[int(LETTERS[0]), *request.sequences[0].token_ids] for request in requests])
    likeliest = LETTERS[draft.probabilities(text[:, :-1], temperature).argmax(axis=-1)]
    assert engine.stats().speculation.acceptance_rate > (likeliest == text[:, 1:]).mean() + 0.05


def test_numbers_ahead_are_those_that_come(llm):
    engine = make_engine(llm, "SLAB_POOL", 1 << 10)

    def sequence(seed=5) -> Sequence:
        return engine.intake.request([5], SamplingParams(seed=seed, temperature=1.0)).sequences[0]

    one, ahead = sequence(), sequence()
    expected = []
    for token in range(3, 40):
        expected += one.uniforms(1)
        one.accept(token)
    given = ahead.uniforms(10)
    for token in range(3, 40):
        assert ahead.uniforms(4)[0] == ahead.uniforms(1)[0]
        given += ahead.uniforms(12)[10:11]
        ahead.accept(token)
    assert given[:37] == expected
    assert sequence(6).uniforms(2) != given[:2]
    assert len(set(given)) == len(given)
