"""Llama against transformers: small random ones of awkward shapes, and SmolLM2."""

import copy
import json
import pydoc_data.topics

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

from pace import LLM, SamplingParams
from pace.engine.tokenizer import Tokenizer
from pace.models import open_checkpoint
from pace.ops import OperatorConfig

from . import parity
from .parity import assert_near, drawn, errors, greedy, load, peer_greedy, peer_logits, run, save
from .tiny import llama, write_gguf

BF16 = ml_dtypes.bfloat16
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA = parity.Family(LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "rope_parameters": DEFAULT})
make = LLAMA.make
CASES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "draft_of_pard": {"tie_word_embeddings": True, "pard_token": 96},
    "odd_sizes": {"hidden_size": 45, "intermediate_size": 77, "num_attention_heads": 3, "num_key_value_heads": 3},
    "head_dim_24_groups_of_3": {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 24},
    "head_dim_80_groups_of_8": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 80,
        "tie_word_embeddings": True,
    },
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "head_dim": 24},
    "linear": {"rope_parameters": parity.LINEAR},
    "llama3": {"rope_parameters": parity.LLAMA3, "head_dim": 64, "num_key_value_heads": 1},
    "yarn": {"rope_parameters": parity.YARN},
    "yarn_mscale": {"rope_parameters": parity.YARN | {"mscale": 0.8, "mscale_all_dim": 0.4, "truncate": False}},
    "dynamic": {"rope_parameters": parity.DYNAMIC | {"factor": 8.0}, "max_position_embeddings": 64},
    "longrope": {"rope_parameters": parity.longrope(8)},
    "gelu_one_layer": {"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 1, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("old_rope", [False, True], ids=["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("case", CASES)
def test_as_transformers_in_float32(tmp_path, rung, case, old_rope):
    parity.check_float32(LLAMA, CASES[case], tmp_path, count=40, old_rope=old_rope)


def test_another_rope_scaling_key(tmp_path):
    """`type`, as it was before `rope_type`."""
    peer = make(CASES["linear"])
    save(tmp_path, peer, old_rope=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = drawn(40)
    model = load(tmp_path)
    assert_near(model.logits(run(model, tokens)), peer_logits(peer, tokens))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path, rung, case, record_property):
    parity.check_bfloat16(LLAMA, CASES[case], tmp_path, record_property)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_checkpoint_in_any_dtype(tmp_path, stored):
    """Weights that are exact in every dtype give the same numbers from each."""
    exact = make(CASES["biases"])
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.clamp(-1, 1).mul(64).round().div(64))  # few bits: exact in float16 as well
    save(tmp_path / "exact", exact)
    save(tmp_path / "stored", exact.to(stored))
    tokens = drawn(60)
    for dtype in ("float32", "bfloat16"):
        ours, expected = load(tmp_path / "stored", dtype), load(tmp_path / "exact", dtype)
        assert ours.dtype == np.dtype({"float32": np.float32, "bfloat16": BF16}[dtype])
        assert np.array_equal(ours.logits(run(ours, tokens)), expected.logits(run(expected, tokens)))
    assert load(tmp_path / "stored").dtype == (np.float32 if stored == torch.float32 else BF16)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_auto_where_no_dtype_is_declared(tmp_path, stored):
    save(tmp_path, make(dtype=stored))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).dtype == (np.float32 if stored == torch.float32 else BF16)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F32, np.float32), (Kind.F16, BF16), (Kind.BF16, BF16), (Kind.Q8_0, BF16)], ids=str
)
def test_auto_of_gguf(tmp_path, kind, dtype):
    assert load(write_gguf(tmp_path / "tiny.gguf", llama(), kind)).dtype == dtype


def test_float32_weights_are_rounded_once_to_bfloat16(tmp_path):
    peer = make()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    norms = {name: p.clone() for name, p in peer.named_parameters() if p.ndim == 1}
    save(tmp_path / "float32", peer)
    rounded = peer.to(torch.bfloat16)
    save(tmp_path / "bfloat16", rounded)
    tokens = drawn(60)
    from_float32, from_bfloat16 = load(tmp_path / "float32", "bfloat16"), load(tmp_path / "bfloat16")
    assert norms
    for ours, theirs in zip(from_float32.layers, from_bfloat16.layers, strict=True):
        assert np.array_equal(ours.attention.qkv.weight.panels, theirs.attention.qkv.weight.panels)
        assert np.array_equal(ours.mlp.weights[0].panels, theirs.mlp.weights[0].panels)
        # Vectors stay in float32: they cost nothing, and the norms are computed in float32.
        assert not np.array_equal(ours.mlp_norm.weight, theirs.mlp_norm.weight)
    logits = [model.logits(run(model, tokens)) for model in (from_float32, from_bfloat16)]
    assert_near(*logits, tolerance=0.1)


def test_shards(tmp_path):
    peer = make(CASES["biases"])
    save(tmp_path / "whole", peer)
    peer.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    tokens = drawn(60)
    whole, shards = load(tmp_path / "whole"), load(tmp_path / "shards")
    assert np.array_equal(whole.logits(run(whole, tokens)), shards.logits(run(shards, tokens)))


def test_reference_operators(tmp_path):
    peer = make(CASES["head_dim_24_groups_of_3"])
    save(tmp_path, peer)
    tokens = drawn(40)
    model = load(tmp_path, operators=OperatorConfig.all("REFERENCE"))
    assert_near(model.logits(run(model, tokens)), peer_logits(peer, tokens))
    assert greedy(model, tokens, 32) == greedy(load(tmp_path), tokens, 32)


# --- SmolLM2 ---

PROMPTS = [
    "Once upon a time, there was a little girl named",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Q: What is 17 + 25?\nA:",
    "Water boils at a temperature of",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of robotics are:\n1.",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a poet.<|im_end|>\n<|im_start|>user\nThe sea.<|im_end|>\n<|im_start|>assistant\n",
    "import numpy as np\n\n# Multiply two matrices\n",
    "Ingredients:\n- 2 eggs\n- 100 g flour\n-",
    "Albert Einstein was born in",
    "La tour Eiffel se trouve à",
    "In 1969, the first man on the moon",
    "SELECT name, age FROM users WHERE",
    "The mitochondria is",
    "Roses are red, violets are",
    "Chapter 1\n\nIt was a dark and stormy night",
    '{"name": "Alice", "age": 30, "city":',
    "a",
]


@pytest.fixture(scope="module")
def smol(smollm2):
    return LLM(smollm2, dtype="float32", kv_cache_bytes=512 << 20)


@pytest.fixture(scope="module")
def smol_bfloat16(smollm2):
    return LLM(smollm2, dtype="bfloat16", kv_cache_bytes=256 << 20)


@pytest.fixture(scope="module")
def smol_peer(smollm2):
    """transformers' Llama with our reading of the file: what is compared is the model, not the dequantisation."""
    with open_checkpoint(smollm2) as checkpoint:
        with torch.device("meta"):
            peer = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
        tensors = {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint.names()}
    peer.load_state_dict(tensors, strict=False, assign=True)
    peer.tie_weights()
    return LLAMA.with_rope(peer.eval())


def pydoc_tokens(smollm2, count):
    text = "".join(pydoc_data.topics.topics.values())
    return Tokenizer.load(smollm2).encode(text[: 6 * count])[:count]


@pytest.fixture(scope="module")
def completions(smol):
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    return [(result.prompt_token_ids, result.outputs[0].token_ids) for result in smol.generate(PROMPTS, params)]


def test_smollm2_every_token_is_the_most_probable_to_transformers(completions, smol_peer):
    """All that a greedy text is, token by token: that the prompt and our text so far make transformers say the next."""
    for prompt, made in completions:
        assert len(made) == 64
        logits = peer_logits(smol_peer, prompt + made)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == made


def test_smollm2_greedy_text_of_transformers(completions, smol_peer):
    for prompt, made in completions[7:10]:
        assert peer_greedy(smol_peer, prompt, 64) == made


@pytest.mark.slow
def test_smollm2_greedy_texts_of_transformers(completions, smol_peer):
    for prompt, made in completions:
        assert peer_greedy(smol_peer, prompt, 64) == made


def test_smollm2_layer_by_layer(smol, smol_peer, smollm2, rung):
    tokens = pydoc_tokens(smollm2, 200)
    parity.assert_same_layers(LLAMA, smol.model, smol_peer, tokens)
    assert_near(smol.model.logits(run(smol.model, tokens)), peer_logits(smol_peer, tokens))


@pytest.fixture(scope="module")
def smol_peer_bfloat16(smol_peer):
    """transformers in float32 and in bfloat16, both with weights rounded to bfloat16."""
    rounded = LLAMA.with_rope(copy.deepcopy(smol_peer).to(torch.bfloat16))
    return LLAMA.with_rope(copy.deepcopy(rounded).float()), rounded


def test_smollm2_bfloat16_is_as_near_to_float32_as_transformers_is(
    smol_bfloat16, smol_peer, smol_peer_bfloat16, smollm2, rung, record_property
):
    tokens = pydoc_tokens(smollm2, 256)
    exact_peer, peer = smol_peer_bfloat16
    exact = peer_logits(exact_peer, tokens)
    ours = errors(smol_bfloat16.model.logits(run(smol_bfloat16.model, tokens)), exact)
    theirs = errors(peer_logits(peer, tokens), exact)
    record_property("ours / theirs", (ours / theirs).tolist())
    assert (ours <= parity.BF16_ERRORS * theirs).all(), ours / theirs


def perplexity(logits_of, tokens, window):
    """Of the tokens of each window but its first."""
    losses = []
    for start in range(0, len(tokens), window):
        part = tokens[start : start + window]
        logits = torch.from_numpy(logits_of(part))[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(part[1:]), reduction="none"))
    return float(torch.cat(losses).mean().exp())


def assert_same_perplexity(llms, peer, tokens, window, record_property):
    theirs = perplexity(lambda part: peer_logits(peer, part), tokens, window)
    for llm in llms:
        ours = perplexity(lambda part, model=llm.model: model.logits(run(model, part)), tokens, window)
        record_property(f"perplexity in {llm.model.dtype}, of transformers", (ours, theirs))
        assert abs(ours / theirs - 1) < 0.005


def test_smollm2_perplexity(smol, smol_bfloat16, smol_peer, smollm2, record_property):
    tokens = pydoc_tokens(smollm2, 1024)
    assert_same_perplexity([smol, smol_bfloat16], smol_peer, tokens, 512, record_property)


@pytest.mark.slow
def test_smollm2_perplexity_of_a_longer_text(smol, smol_bfloat16, smol_peer, smollm2, record_property):
    tokens = pydoc_tokens(smollm2, 16384)
    assert_same_perplexity([smol, smol_bfloat16], smol_peer, tokens, 1024, record_property)
