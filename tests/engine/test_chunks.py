"""How many tokens of prompts go along with texts that are being written, on a clock that tests make up."""

import pytest

from pace.engine.chunks import FRESH, Chunks

PER_TOKEN = 5e-5  # seconds


def lives(chunks, alone, steps, decoding=20):
    """What a queue of prompts that never empties gets, step by step; `alone` seconds a step takes without any."""
    taken = []
    for step in range(steps):
        tokens = chunks.tokens(decoding)
        seconds = alone(step) if callable(alone) else alone
        chunks.observe(decoding, tokens, seconds + PER_TOKEN * tokens)
        taken.append(tokens)
    return taken


def test_a_queue_that_never_empties_gets_what_the_limit_allows():
    taken = lives(Chunks(stretch=2.0), 0.02, 200)
    fits = 0.02 / PER_TOKEN
    assert 0.8 * fits < taken[-1] <= fits
    assert max(taken) <= fits
    assert taken.count(0) == 1 + 199 // (FRESH + 1)


def test_more_sequences_are_another_step():
    chunks = Chunks(stretch=2.0)
    lives(chunks, 0.008, 50, decoding=1)
    assert lives(chunks, 0.04, 100, decoding=64)[-1] > 0.8 * 0.04 / PER_TOKEN


def test_steps_that_become_longer_are_measured_again():
    taken = lives(Chunks(stretch=2.0), lambda step: 0.02 + 5e-5 * step, 1000)
    assert taken[-1] > 0.8 * 0.04 / PER_TOKEN


@pytest.mark.parametrize("stretch", [1.5, 3.0])
def test_a_step_is_stretched_by_no_more(stretch):
    taken = lives(Chunks(stretch), 0.02, 200)
    assert 1 + PER_TOKEN * taken[-1] / 0.02 <= stretch
