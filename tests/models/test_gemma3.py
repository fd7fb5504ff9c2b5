"""Gemma 3 against transformers: small random ones of awkward shapes, and gemma-3-270m."""

import copy
import json
import pydoc_data.topics

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3 import modeling_gemma3

from pace.errors import ModelError
from pace.models import load_model, open_checkpoint
from pace.models.gemma3_text import DEFAULTS
from pace.models.gguf import GGUFFile

from . import parity
from .parity import assert_near, drawn, errors, greedy, load, peer_greedy, peer_logits, run, save
from .test_llama import perplexity


class GemmaFamily(parity.Family):
    def with_rope(self, peer):
        """And its scale of embeddings in float32, which the model rounds to its own dtype."""
        for module in peer.modules():
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale)
        return super().with_rope(peer)


# Windows shorter than the prompts; rotary positions that differ from kind to kind; scores not scaled by head_dim.
BASE = {
    "sliding_window": 19,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
}
GEMMA = GemmaFamily(Gemma3TextConfig, Gemma3ForCausalLM, BASE)
CASES = {
    "plain": {},
    "untied_odd_biases": {
        "tie_word_embeddings": False,
        "hidden_size": 45,
        "intermediate_size": 77,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "attention_bias": True,
    },
    "layer_types_yarn": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "num_key_value_heads": 1,
        "head_dim": 40,
        "rope_parameters": {"full_attention": parity.YARN},
    },
    "softcaps": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
}
named = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def softcap_of_scores(monkeypatch):
    """transformers reads attn_logit_softcapping and forgets to give it to its own attention."""
    forgetful = modeling_gemma3.eager_attention_forward

    def eager(module, *args, **options):
        return forgetful(module, *args, softcap=module.attn_logit_softcapping, **options)

    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", eager)


@named
def test_float32(case, tmp_path, rung):
    parity.check_float32(GEMMA, CASES[case], tmp_path, count=40)


@named
def test_bfloat16(case, tmp_path, rung, record_property):
    parity.check_bfloat16(GEMMA, CASES[case], tmp_path, record_property)


@named
def test_caches(case, tmp_path):
    parity.check_caches(GEMMA, CASES[case], tmp_path)


def rewrite(path, edit):
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def logits_of(path, tokens):
    model = load(path)
    return model.logits(run(model, tokens))


def test_config_of_transformers_4(tmp_path):
    """Rotary positions and layers by their older keys."""
    save(tmp_path, GEMMA.make())
    expected = logits_of(tmp_path, drawn(90))

    def older(config):
        rope = config.pop("rope_parameters")
        del config["layer_types"]
        config |= {"sliding_window_pattern": 3, "rope_theta": 500000.0, "rope_local_base_freq": 5000.0}
        config["rope_scaling"] = {"rope_type": "linear", "factor": rope["full_attention"]["factor"]}

    rewrite(tmp_path, older)
    assert np.array_equal(logits_of(tmp_path, drawn(90)), expected)


def test_what_a_config_leaves_out():
    """Most keys, in those of the multimodal models: what it means then is what transformers takes."""
    peer, ours = Gemma3TextConfig().to_dict(), dict(DEFAULTS)
    pattern = ours.pop("sliding_window_pattern")
    rope = peer["rope_parameters"]
    peer["rope_theta"] = rope["full_attention"]["rope_theta"]
    peer["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    assert {key: peer[key] for key in ours} == ours
    assert (
        peer["layer_types"]
        == (["sliding_attention"] * (pattern - 1) + ["full_attention"]) * 4 + ["sliding_attention"] * 2
    )
    assert peer["rms_norm_eps"] == 1e-6


def test_bidirectional_is_refused(tmp_path):
    save(tmp_path, GEMMA.make())
    rewrite(tmp_path, lambda config: config.update(use_bidirectional_attention=True))
    with pytest.raises(ModelError, match=r"use_bidirectional_attention in config\.json is true"):
        load(tmp_path)


# --- GGUF ---


def write_gguf(path, config, tensors):
    """As llama.cpp's converter writes it: names by the table of the `gguf` package, 1 added to norms' weights."""
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    if (local := config.rope_parameters["sliding_attention"]["rope_theta"]) != 10000.0:
        writer.add_float32("gemma3.rope.freq_base_swa", local)
    if (factor := config.rope_parameters["full_attention"].get("factor")) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, tensor in tensors.items():
        values = tensor.float().numpy() + np.float32(name.endswith("norm.weight"))
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("local", [5000.0, 10000.0])
def test_gguf(tmp_path, local):
    rope = {
        "full_attention": BASE["rope_parameters"]["full_attention"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    # What files do not say is fixed: the pattern, and how scores are scaled.
    changes = {"num_hidden_layers": 7, "sliding_window_pattern": 6, "query_pre_attn_scalar": 16}
    peer = GEMMA.make(changes | {"rope_parameters": rope})
    save(tmp_path / "saved", peer)
    tensors = {name: value for name, value in peer.state_dict().items() if name != "lm_head.weight"}
    path = write_gguf(tmp_path / "tiny.gguf", peer.config, tensors)
    assert np.array_equal(logits_of(path, drawn(90)), logits_of(tmp_path / "saved", drawn(90)))


def test_gguf_of_the_27b(tmp_path):
    """Its scores alone are not scaled by 1 / √head_dim."""
    shape = {"hidden_size": 5376, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
    config = GEMMA.make().config
    for key, value in (shape | {"num_hidden_layers": 62}).items():
        setattr(config, key, value)
    path = write_gguf(tmp_path / "large.gguf", config, {"model.embed_tokens.weight": torch.zeros(8, 4)})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == 168


# --- gemma-3-270m ---

PROMPTS = [
    "Once upon a time, there was a little girl named",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "La tour Eiffel se trouve à",
    "Ingredients:\n- 2 eggs\n- 100 g flour\n-",
    "In 1969, the first man on the moon",
]


@pytest.fixture(scope="module")
def real(gemma3_270m):
    with open_checkpoint(gemma3_270m) as checkpoint:
        return load_model(checkpoint, "float32")


@pytest.fixture(scope="module")
def real_peer(gemma3_270m):
    """transformers' Gemma with our reading of the file: what is compared is the model, not the dequantisation."""
    with open_checkpoint(gemma3_270m) as checkpoint:
        with torch.device("meta"):
            peer = Gemma3ForCausalLM(Gemma3TextConfig(**checkpoint.config))
        tensors = {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint.names()}
    peer.load_state_dict(tensors, strict=False, assign=True)
    peer.tie_weights()
    return GEMMA.with_rope(peer.eval())


@pytest.fixture(scope="module")
def encode(gemma3_270m):
    """Text as the longest tokens that it begins with, which for plain English are those of Gemma's tokenizer."""
    pieces = {piece: i for i, piece in enumerate(GGUFFile(gemma3_270m).metadata["tokenizer.ggml.tokens"])}

    def encoded(text):
        tokens, text = [2], text.replace(" ", "▁")
        while text:
            length = next(size for size in range(32, 0, -1) if text[:size] in pieces)
            tokens.append(pieces[text[:length]])
            text = text[length:]
        return tokens

    return encoded


def pydoc_tokens(encode, count):
    return encode("".join(pydoc_data.topics.topics.values())[: 6 * count])[:count]


@pytest.fixture(scope="module")
def completions(real, encode):
    """Each prompt with 64 tokens, all in one batch."""
    prompts = [encode(prompt) for prompt in PROMPTS]
    cache = parity.new_cache(real)
    sequences, new, made = [cache.allocate() for _ in prompts], prompts, np.zeros((len(prompts), 0), np.int32)
    for _ in range(64):
        placement = cache.append(sequences, [len(tokens) for tokens in new])
        hidden = real.forward(np.concatenate(new).astype(np.int32), placement, cache)
        new = real.logits(hidden[placement.starts[1:] - 1]).argmax(-1)[:, None]
        made = np.concatenate([made, new], axis=1)
    return list(zip(prompts, made.tolist(), strict=True))


def test_gemma3_270m_every_token_is_the_most_probable_to_transformers(completions, real_peer):
    for prompt, made in completions:
        assert peer_logits(real_peer, prompt + made)[len(prompt) - 1 : -1].argmax(-1).tolist() == made


def test_gemma3_270m_greedy_text_of_transformers(completions, real_peer):
    for prompt, made in completions[2:3]:
        assert peer_greedy(real_peer, prompt, 64) == made


@pytest.mark.slow
def test_gemma3_270m_greedy_texts_of_transformers(completions, real_peer):
    for prompt, made in completions:
        assert peer_greedy(real_peer, prompt, 64) == made


def test_gemma3_270m_layer_by_layer(real, real_peer, encode, rung):
    tokens = pydoc_tokens(encode, 600)  # more than the window of 512
    parity.assert_same_layers(GEMMA, real, real_peer, tokens)
    assert_near(real.logits(run(real, tokens)[-50:]), peer_logits(real_peer, tokens)[-50:])


@pytest.fixture(scope="module")
def real_bfloat16(gemma3_270m):
    with open_checkpoint(gemma3_270m) as checkpoint:
        return load_model(checkpoint)


@pytest.fixture(scope="module")
def real_peer_bfloat16(real_peer):
    return GEMMA.with_rope(copy.deepcopy(real_peer).to(torch.bfloat16))


def assert_same_perplexity(ours, theirs, tokens, window, record_property):
    """Each within 0.5 % of its peer, which is of the same dtype: bfloat16 itself moves it by 2 %."""
    for model, peer in zip(ours, theirs, strict=True):
        mine = perplexity(lambda part, model=model: model.logits(run(model, part)), tokens, window)
        expected = perplexity(lambda part, peer=peer: peer_logits(peer, part), tokens, window)
        record_property(f"perplexity in {model.dtype}, of transformers", (mine, expected))
        assert abs(mine / expected - 1) < 0.005


def test_gemma3_270m_perplexity(real, real_peer, encode, record_property):
    """In a window longer than the local layers'."""
    tokens = pydoc_tokens(encode, 600)
    assert_same_perplexity([real], [real_peer], tokens, len(tokens), record_property)


@pytest.mark.slow
def test_gemma3_270m_perplexity_of_a_longer_text(
    real, real_bfloat16, real_peer, real_peer_bfloat16, encode, record_property
):
    tokens = pydoc_tokens(encode, 4096)
    assert_same_perplexity([real, real_bfloat16], [real_peer, real_peer_bfloat16], tokens, 1024, record_property)


def test_gemma3_270m_says_what_is_so(real_bfloat16, encode, gemma3_270m):
    """The file is read as it was meant: a model of wrong norms writes no English."""
    tokens = GGUFFile(gemma3_270m).metadata["tokenizer.ggml.tokens"]
    made = greedy(real_bfloat16, encode("The opposite of hot is"), 1)
    assert tokens[made[0]] == "▁cold"


def test_gemma3_270m_bfloat16_is_as_near_to_float32_as_transformers_is(
    real_bfloat16, real_peer, real_peer_bfloat16, encode, record_property
):
    tokens = pydoc_tokens(encode, 100)
    theirs = peer_logits(real_peer_bfloat16, tokens)
    exact = peer_logits(GEMMA.with_rope(copy.deepcopy(real_peer_bfloat16).float()), tokens)
    ours = errors(real_bfloat16.logits(run(real_bfloat16, tokens)), exact) / errors(theirs, exact)
    record_property("ours / theirs", ours.tolist())
    assert (ours <= parity.BF16_ERRORS).all(), ours
