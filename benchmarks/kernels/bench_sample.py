import numpy as np
import pytest

from benchmarks.case import draw
from pace.reference.sample import SAMPLING_DTYPE, History

# Llama-3.2-1B, SmolLM2-135M.
VOCABULARIES = [128256, 49152]
OFF = {"temperature": 1, "top_p": 1, "repetition_penalty": 1}
SETTINGS = {
    "greedy": {"temperature": 0},
    "top-k": {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    "penalties": {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1},
}
HISTORY = 512  # tokens a row has seen
NUM_LOGPROBS = 5  # with the last of the settings


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("setting", SETTINGS)
def bench_sample(race, setting, vocabulary, rows):
    logits = 3 * draw(rows, vocabulary)
    params = np.zeros(rows, SAMPLING_DTYPE)
    for name, value in (OFF | SETTINGS[setting]).items():
        params[name] = value
    generator = np.random.default_rng(0)
    penalised = "repetition_penalty" in SETTINGS[setting]
    history = history_of(generator, rows, vocabulary) if penalised else None
    race(
        "sample",
        logits,
        params,
        generator.random(rows),
        history,
        None,
        NUM_LOGPROBS if penalised else None,
        shape=f"{rows} × {vocabulary}, {setting}",
        num_bytes=logits.nbytes,
        torch=torch_sample(**SETTINGS[setting]),
        rtol=0,  # tokens are the same
        atol=1e-5,  # log-probabilities: a logarithm of a float64 sum, and one rounding of a number below 128
    )


def history_of(generator, rows, vocabulary):
    ids = [generator.permutation(vocabulary)[:HISTORY] for _ in range(rows)]
    counts = generator.integers(0, 3, rows * HISTORY, np.int32)
    return History(np.concatenate(ids).astype(np.int32), counts, HISTORY * np.arange(rows + 1))


def torch_sample(temperature, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """As eager pipelines do it, with settings that all rows share."""

    def sample(logits, params, uniforms, history, bias, num_logprobs):
        import torch

        z = logits
        if history:
            ids = history.token_ids.view(len(z), -1).long()
            seen = z.gather(1, ids)
            z = z.scatter(1, ids, torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty))
        if temperature == 0:
            return z.argmax(-1)
        z, order = z.topk(top_k) if top_k else z.sort(descending=True)
        weights = (z / temperature).softmax(-1)
        weights[weights.cumsum(-1) - weights >= top_p] = 0
        tokens = order.gather(1, weights.multinomial(1))
        if num_logprobs is None:
            return tokens
        logprobs = logits.log_softmax(-1)
        drawn = logprobs.gather(1, tokens)
        return tokens, drawn, (logprobs >= drawn).sum(-1), logprobs.topk(num_logprobs)

    return sample
