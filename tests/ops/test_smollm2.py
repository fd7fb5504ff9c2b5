"""A real model on every backend: REFERENCE's logits, and its greedy text."""

import numpy as np
import pytest

from pace import LLM
from tests.engine.fakes import greedy

from .test_backends import BACKENDS

OTHERS = [backend for backend in BACKENDS if backend.values != ("REFERENCE",)]
PROMPT = "The sky is blue because"
WRITTEN = 16
# Of the largest logit. float32: sums in another order, through 30 layers; measured up to 2.5e-6. bfloat16: another sum
# may round to the neighbour, 2^-8 away, at each of some two hundred roundings; measured up to 0.017.
NEAR = {"float32": 1e-5, "bfloat16": 0.04}


def answer(path, dtype, backend):
    """The logits behind each token of the prompt, and the text."""
    llm = LLM(path, dtype=dtype, kv_cache_bytes=32 << 20, operators=backend)
    tokens = np.array(llm.tokenizer.encode(PROMPT), np.int32)
    cache = llm.engine.cache
    placement = cache.append([cache.allocate()], [len(tokens)])
    logits = llm.model.logits(llm.model.forward(tokens, placement, cache))
    text = llm.generate(PROMPT, greedy(max_tokens=WRITTEN))[0].outputs[0].token_ids if dtype == "float32" else None
    return logits, text


@pytest.fixture(scope="module", params=NEAR)
def expected(request, smollm2):
    return request.param, *answer(smollm2, request.param, "REFERENCE")


@pytest.mark.parametrize("backend", OTHERS)
def test_a_real_model(backend, expected, smollm2):
    dtype, logits, text = expected
    ours, written = answer(smollm2, dtype, backend)
    assert np.abs(ours - logits).max() < NEAR[dtype] * np.abs(logits).max()
    assert written == text
