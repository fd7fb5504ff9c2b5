"""Small random models of every family in the engine, many texts at once, against transformers one by one."""

import json

import numpy as np
import pytest

from pace import LLM
from pace.cache import CACHES
from pace.engine.images import Pixels
from pace.ops import OperatorConfig
from tests.models import parity
from tests.models.test_gemma3 import GEMMA
from tests.models.test_gemma3_images import SEEING, Prompt, ShownPeer
from tests.models.test_gpt_oss import GPT_OSS, make_mxfp4
from tests.models.test_gptj import GPTJ
from tests.models.test_llama import LLAMA
from tests.models.test_opt import OPT
from tests.models.test_phi3 import LONG, PHI3
from tests.models.test_qwen import QWEN2, QWEN3, SLIDING

from .fakes import VOCABULARY, greedy, write_tokenizer
from .test_scheduling import make_engine, run

WRITTEN = 16
LENGTHS = (3, 54, 90)  # of prompts: around the windows of 19 and the 64 of LongRoPE's short factors
FAMILIES = {
    "llama": (LLAMA, {"rope_parameters": parity.LLAMA3}),
    "llama_dynamic": (LLAMA, {"rope_parameters": parity.DYNAMIC, "max_position_embeddings": 60}),
    "qwen2_windows": (QWEN2, SLIDING),
    "qwen3": (QWEN3, {}),
    "phi3_longrope": (PHI3, LONG | {"rope_parameters": parity.longrope(9)}),
    "opt": (OPT, {}),
    "gptj": (GPTJ, {}),
    "gemma3_text": (GEMMA, {}),
    "gpt_oss": (GPT_OSS, {}),
}


def load(path, **options):
    write_tokenizer(path)
    return LLM(path, **options)


def images_of(prompt):
    """Random ones, as many as it has places for."""
    generator = np.random.default_rng(len(prompt.tokens))
    return [Pixels(generator.integers(0, 256, (31, 31, 3), np.uint8)) for _ in prompt.pixels]


def crowded(llm, cache, **limits):
    """An engine with batches of few tokens, and little room where blocks are small."""
    room = 224 if cache in ("SLAB_POOL", "PAGED") else 4096
    return make_engine(llm, cache, room, max_batch_tokens=16, **limits)


def answers(engine, prompts):
    """What all of them get at once."""
    requests = [engine.intake.request(each, greedy(max_tokens=WRITTEN, ignore_eos=True)) for each in prompts]
    run(engine, requests)
    return [request.output().outputs[0].token_ids for request in requests]


@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_text(family, changes, tmp_path):
    """In float32 the tokens are those of transformers, from every cache; in bfloat16 those of one another."""
    peer = family.make(changes | {"vocab_size": VOCABULARY})
    parity.save(tmp_path, peer)
    prompts = [parity.drawn(length, VOCABULARY, seed=length) for length in LENGTHS]
    expected = [parity.peer_greedy(peer, tokens, WRITTEN) for tokens in prompts]
    exact, rounded = (load(tmp_path, dtype=dtype, kv_cache_bytes=1 << 20) for dtype in ("float32", "bfloat16"))
    alone = answers(crowded(rounded, "DYNAMIC", max_sequences=1), prompts)
    for cache in CACHES:
        assert answers(crowded(exact, cache), prompts) == expected, cache
        assert answers(crowded(rounded, cache), prompts) == alone, cache


def test_mxfp4_on_twins(tmp_path):
    peer = make_mxfp4(tmp_path, vocab_size=VOCABULARY)
    prompts = [parity.drawn(length, VOCABULARY, seed=length) for length in LENGTHS]
    expected = [parity.peer_greedy(peer, tokens, WRITTEN) for tokens in prompts]
    for operators in OperatorConfig(), OperatorConfig.all("REFERENCE"):
        llm = load(tmp_path, dtype="float32", kv_cache_bytes=1 << 20, operators=operators)
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, greedy(max_tokens=WRITTEN))] == expected


def test_images(tmp_path):
    """One, two and three in a prompt, side by side, in batches of fewer tokens than an image and its windows have."""
    peer = SEEING.make({"text": {"vocab_size": VOCABULARY}})
    parity.save(tmp_path, peer)
    llm = load(tmp_path, dtype="float32", kv_cache_bytes=1 << 20)
    prompts, expected = [], []
    for prompt in Prompt(40, None, 50), Prompt(None, 30, None, 1, None, 25), Prompt(20, None, None, seed=3):
        images = images_of(prompt)
        prompt.pixels = np.stack([llm.model.images.normalised(image.values) for image in images])
        prompts.append({"prompt": prompt.tokens, "images": images})
        expected.append(parity.peer_greedy(ShownPeer(peer, prompt), prompt.tokens, WRITTEN))
    for cache in CACHES:
        engine = crowded(llm, cache)
        assert answers(engine, [*prompts, prompts[1]]) == [*expected, expected[1]], cache
        before = engine.stats().cached_tokens
        assert answers(engine, [prompts[1]]) == [expected[1]], cache
        assert (engine.stats().cached_tokens > before) == (cache == "PAGED")
    assert answers(crowded(llm, "PAGED", policy="decode_first"), prompts) == expected


@pytest.mark.parametrize("cache", ["SLAB_POOL", "PAGED"])
def test_windows_make_room(cache, tmp_path):
    """A pool in which one layer of three sees all takes more texts at once, and nobody is sent away."""
    parity.save(tmp_path, GEMMA.make({"vocab_size": VOCABULARY, "sliding_window": 16}))
    windowed = load(tmp_path, dtype="bfloat16", kv_cache_bytes=1 << 20)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"] * 3}))
    full = load(tmp_path, dtype="bfloat16", kv_cache_bytes=1 << 20)
    prompts = [parity.drawn(200, VOCABULARY, seed=seed) for seed in range(6)]

    def most_at_once(llm):
        engine = make_engine(llm, cache, 704, False, max_batch_tokens=16)
        requests = [engine.intake.request(each, greedy(max_tokens=64, ignore_eos=True)) for each in prompts]
        for request in requests:
            engine.add(request)
        most = 0
        while engine.busy:
            engine.step()
            most = max(most, len(engine.scheduler.running))
        assert engine.stats().preemptions == 0
        return most

    assert most_at_once(full) == 2
    assert most_at_once(windowed) >= 5
