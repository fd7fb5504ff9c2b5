import numpy as np
import pytest

from benchmarks.case import draw
from pace.reference.sample import SAMPLING_DTYPE, History

# Llama-3.2-1B, SmolLM2-135M.
VOCABULARIES = [128256, 49152]
OFF = {"temperature": 1, "top_p": 1, "typical_p": 1, "repetition_penalty": 1}
SETTINGS = {
    "greedy": {"temperature": 0},
    "top-k": {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    "penalties": {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1},
    "typical-p": {"temperature": 0.7, "typical_p": 0.95},
    "mask": {"temperature": 0.7},
}
MASKED = "mask"  # the setting with masks, each of half of the tokens, drawn at random
CASES = [(s, v) for s in SETTINGS for v in VOCABULARIES if v == VOCABULARIES[0] or s not in ("typical-p", MASKED)]
HISTORY = 512  # tokens a row has seen
NUM_LOGPROBS = 5  # with penalties


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("setting", "vocabulary"), CASES)
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
        masks_of(generator, rows, vocabulary) if setting == MASKED else None,
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


def masks_of(generator, rows, vocabulary):
    return generator.integers(-(2**31), 2**31, (rows, -(-vocabulary // 32)), np.int64).astype(np.int32)


def torch_sample(temperature, top_k=0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0):
    """As eager pipelines do it, with settings that all rows share."""

    def sample(logits, params, uniforms, history, bias, num_logprobs, allowed):
        import torch

        z = logits
        if history:
            ids = history.token_ids.view(len(z), -1).long()
            seen = z.gather(1, ids)
            z = z.scatter(1, ids, torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty))
        if allowed is not None:
            ids = torch.arange(z.shape[-1])
            z = z.masked_fill(allowed[:, ids // 32] >> ids % 32 & 1 == 0, -torch.inf)
        if temperature == 0:
            return z.argmax(-1)
        if typical_p < 1:
            logprobs = (z / temperature).log_softmax(-1)
            shift = (-logprobs - (-logprobs * logprobs.exp()).sum(-1, keepdim=True)).abs()
            order = shift.sort().indices
            weights = logprobs.gather(1, order).exp()
            weights[weights.cumsum(-1) - weights >= typical_p] = 0
            return order.gather(1, weights.multinomial(1))
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
