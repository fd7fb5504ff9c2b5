"""Llama against transformers: small random ones of awkward shapes, and SmolLM2."""

import copy
import json
import pydoc_data.topics
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

from pace import LLM, SamplingParams
from pace.cache import CACHES
from pace.engine.tokenizer import Tokenizer
from pace.models import load_model, open_checkpoint
from pace.ops import OperatorConfig

from .tiny import llama, write_gguf

BF16 = ml_dtypes.bfloat16

# Sums of a few hundred float32 terms in another order differ by a few 2^-24 of the terms' size; a layer adds one such
# error to the residual, and attention may amplify those before it. Relative to the largest value of the tensor:
# measured at most 3.1e-6 over all of the shapes below.
TOLERANCE = 3e-5
# Our bfloat16 rounds where transformers' does or less often, so its error is the yardstick of ours.
BF16_ERRORS = 1.5

# Shapes that are no multiple of the panels' 16 or of the pairs' 2, and every switch of the configuration.
BASE = {
    "vocab_size": 97,
    "hidden_size": 72,
    "intermediate_size": 131,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 300,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
CASES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "odd_sizes": {"hidden_size": 45, "intermediate_size": 77, "num_attention_heads": 3, "num_key_value_heads": 3},
    "head_dim_24_groups_of_3": {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 24},
    "head_dim_80_groups_of_8": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 80,
        "tie_word_embeddings": True,
    },
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "head_dim": 24},
    "linear": {"rope_parameters": LINEAR},
    "llama3": {"rope_parameters": LLAMA3, "head_dim": 64, "num_key_value_heads": 1},
    "gelu_one_layer": {"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 1, "rms_norm_eps": 1e-3},
}


def make(changes=(), dtype=torch.float32):
    """A random Llama, its biases and norms too, whose weights are exact in bfloat16."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(BASE | dict(changes)))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.15 * torch.randn_like(parameter)
    return with_rope(model.to(torch.bfloat16).to(dtype))


def with_rope(peer):
    """With its table of frequencies in float32 again, as from_pretrained keeps it in every dtype."""
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config)
    return peer


def save(path, model, old_rope=False):
    model.save_pretrained(path)
    if old_rope:  # as transformers 4 wrote it
        config = json.loads((path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        (path / "config.json").write_text(json.dumps(config))


def load(path, dtype="auto", operators=None):
    with open_checkpoint(path) as checkpoint:
        return load_model(checkpoint, dtype, operators)


def new_cache(model):
    return CACHES["SLAB_POOL"](model.cache_shape, 1100 * model.cache_shape.bytes_per_token, OperatorConfig(), 32)


def run(model, tokens, pieces=()):
    """Final hidden states of one sequence, in one piece or in pieces that begin at `pieces`."""
    cache = new_cache(model)
    sequence = cache.allocate()
    parts = np.split(np.asarray(tokens, np.int32), pieces)
    return np.concatenate([model.forward(part, cache.append([sequence], [len(part)]), cache) for part in parts])


class Recording:
    """A norm that keeps the residual stream as it is where the norm stands."""

    def __init__(self, norm, kept):
        self.norm, self.kept = norm, kept

    def __call__(self, x, residual=None):
        normed = self.norm(x, residual) if residual is not None else self.norm(x)
        self.kept.append((x if residual is None else residual).astype(np.float32))
        return normed


def residuals(model, tokens):
    """The residual stream before each layer and before the last norm."""
    kept = []
    layers, norm = model.layers, model.norm
    model.layers = [replace(layer, attention_norm=Recording(layer.attention_norm, kept)) for layer in layers]
    model.norm = Recording(norm, kept)
    run(model, tokens)
    model.layers, model.norm = layers, norm
    return kept


@torch.no_grad()
def peer_residuals(peer, tokens):
    states = []
    layers = peer.model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, __, output: states.append(output)))
    peer(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return [state[0].float().numpy() for state in states]


@torch.no_grad()
def peer_logits(peer, tokens):
    return peer(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def peer_greedy(peer, tokens, count):
    ids = torch.tensor([tokens])
    made = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **NO_END)
    return made[0, len(tokens) :].tolist()


NO_END = {"eos_token_id": None, "pad_token_id": 0}


def greedy(model, tokens, count):
    cache = new_cache(model)
    sequence, made, new = cache.allocate(), [], list(tokens)
    for _ in range(count):
        hidden = model.forward(np.array(new, np.int32), cache.append([sequence], [len(new)]), cache)
        new = [int(model.logits(hidden[-1:]).argmax())]
        made += new
    return made


def drawn(count, vocabulary=97, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def assert_near(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("old_rope", [False, True], ids=["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("case", CASES)
def test_as_transformers_in_float32(tmp_path, rung, case, old_rope):
    peer = make(CASES[case])
    save(tmp_path, peer, old_rope)
    model = load(tmp_path)
    tokens = drawn(150)
    for layer, (ours, theirs) in enumerate(zip(residuals(model, tokens), peer_residuals(peer, tokens), strict=True)):
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max(), f"what comes into layer {layer}"
    hidden = run(model, tokens)
    assert_near(model.logits(hidden), peer_logits(peer, tokens))
    assert np.array_equal(run(model, tokens, [7, 70, 71, 72, 140]), hidden)
    assert greedy(model, tokens[:20], 64) == peer_greedy(peer, tokens[:20], 64)


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


def errors(logits, exact):
    """Root mean square and largest difference."""
    difference = np.abs(logits - exact)
    return np.array([np.sqrt(np.mean(difference**2)), difference.max()])


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path, rung, case, record_property):
    peer = make(CASES[case], torch.bfloat16)
    save(tmp_path, peer)
    model = load(tmp_path)
    assert model.dtype == BF16
    tokens = drawn(250)
    exact = peer_logits(make(CASES[case]), tokens)
    ours = errors(model.logits(run(model, tokens)), exact)
    theirs = errors(peer_logits(peer, tokens), exact)
    record_property("ours / theirs", (ours / theirs).tolist())
    assert (ours <= BF16_ERRORS * theirs).all(), ours / theirs


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
        assert np.array_equal(ours.mlp.gate_up.panels, theirs.mlp.gate_up.panels)
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
    return with_rope(peer.eval())


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
    ours, theirs = residuals(smol.model, tokens), peer_residuals(smol_peer, tokens)
    for layer, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(mine - expected).max() <= TOLERANCE * np.abs(expected).max(), f"what comes into layer {layer}"
    assert_near(smol.model.logits(run(smol.model, tokens)), peer_logits(smol_peer, tokens))


@pytest.fixture(scope="module")
def smol_peer_bfloat16(smol_peer):
    """transformers in float32 and in bfloat16, both with weights rounded to bfloat16."""
    rounded = with_rope(copy.deepcopy(smol_peer).to(torch.bfloat16))
    return with_rope(copy.deepcopy(rounded).float()), rounded


def test_smollm2_bfloat16_is_as_near_to_float32_as_transformers_is(
    smol_bfloat16, smol_peer, smol_peer_bfloat16, smollm2, rung, record_property
):
    tokens = pydoc_tokens(smollm2, 256)
    exact_peer, peer = smol_peer_bfloat16
    exact = peer_logits(exact_peer, tokens)
    ours = errors(smol_bfloat16.model.logits(run(smol_bfloat16.model, tokens)), exact)
    theirs = errors(peer_logits(peer, tokens), exact)
    record_property("ours / theirs", (ours / theirs).tolist())
    assert (ours <= BF16_ERRORS * theirs).all(), ours / theirs


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
