"""Drafts where positions, windows and images make a token's row depend on more than its place."""

import pytest

from pace.cache import CACHES
from pace.speculative import PROPOSERS
from tests.engine.fakes import VOCABULARY, greedy
from tests.engine.test_families import LENGTHS, WRITTEN, images_of, load
from tests.engine.test_scheduling import run
from tests.models import parity
from tests.models.test_gemma3 import GEMMA
from tests.models.test_gemma3_images import SEEING, Prompt
from tests.models.test_gpt_oss import GPT_OSS
from tests.models.test_llama import LLAMA
from tests.models.test_phi3 import LONG, PHI3

from .conftest import PARD_TOKEN
from .proposers import draft_of, make_engine

FAMILIES = {
    "windows": (GEMMA, {}),
    "experts_sinks_windows": (GPT_OSS, {}),
    "dynamic": (LLAMA, {"rope_parameters": parity.DYNAMIC, "max_position_embeddings": 60}),
    "longrope": (PHI3, LONG | {"rope_parameters": parity.longrope(9)}),
    "images": (SEEING, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request, tmp_path_factory):
    """A model and prompts, some of which grow past a window, or past what the model was trained on."""
    path, (family, changes) = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    sized = {"text": {"vocab_size": VOCABULARY}} if family is SEEING else {"vocab_size": VOCABULARY}
    parity.save(path, family.make(changes | sized))
    llm = load(path, dtype="bfloat16", kv_cache_bytes=1 << 20)
    if family is not SEEING:
        return llm, [parity.drawn(length, VOCABULARY, seed=length) for length in LENGTHS]
    prompts = Prompt(40, None, 50), Prompt(None, 30, None, 1, None, 25)
    return llm, [{"prompt": prompt.tokens, "images": images_of(prompt)} for prompt in prompts]


def texts_of(llm, prompts, cache, speculative, draft=None, **limits):
    room = 224 if cache in ("SLAB_POOL", "PAGED") else 4096
    engine = make_engine(llm, cache, room, None, speculative, draft, **limits)
    requests = [
        engine.intake.request(each, greedy(max_tokens=WRITTEN, ignore_eos=True, logprobs=1)) for each in prompts
    ]
    run(engine, requests)
    texts = [request.output().outputs[0] for request in requests]
    return [(text.token_ids, text.logprobs) for text in texts], engine


@pytest.mark.parametrize("cache", CACHES)
def test_the_same_bits(asked, other, cache, monkeypatch):
    llm, prompts = asked
    plain, _ = texts_of(llm, prompts, "DYNAMIC", None, max_sequences=1)
    written = [
        [*(each["prompt"] if isinstance(each, dict) else each), *tokens]
        for each, (tokens, _) in zip(prompts, plain, strict=True)
    ]
    monkeypatch.setattr(PROPOSERS["knowing"], "knows", written)
    own = other if llm.model.images is not None else llm  # no draft model looks at images
    drafts = {"draft_model": draft_of(own), "pard": draft_of(other, pard_token=PARD_TOKEN)}
    for method in "knowing", "wild", "ngram", "draft_model", "pard":
        speculative = {"method": method, "num_tokens": 5, "adaptive": False}
        if method in drafts:
            speculative["model"] = "draft"
        texts, engine = texts_of(llm, prompts, cache, speculative, drafts.get(method), max_batch_tokens=16)
        assert texts == plain, method
        stats = engine.stats().speculation
        assert stats.drafted > 0 or method == "ngram"
        assert stats.accepted > WRITTEN or method not in ("knowing", "draft_model") or own is other
