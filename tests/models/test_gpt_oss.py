"""GPT-OSS against transformers, its experts in MXFP4 and in bfloat16."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from pace.errors import ModelError
from pace.reference.pack_experts import E2M1, MXFP4

from . import parity
from .parity import BF16_ERRORS, assert_near, drawn, errors, load, peer_logits, run, save

YARN = parity.YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
GPT_OSS = parity.Family(
    GptOssConfig,
    GptOssForCausalLM,
    {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 19,
        "rope_parameters": YARN,
    },
)
CASES = {
    "plain": {},
    "all_experts_no_windows": {"num_experts_per_tok": 5, "layer_types": ["full_attention"] * 3},
    "odd_sizes": {"hidden_size": 40, "intermediate_size": 24, "num_attention_heads": 6, "head_dim": 24},
    "tied_one_expert": {"tie_word_embeddings": True, "num_experts_per_tok": 1, "num_key_value_heads": 1},
    "no_biases": {"attention_bias": False, "swiglu_limit": 0.5},
}
named = pytest.mark.parametrize("case", CASES)


@named
def test_float32(case, tmp_path, rung):
    parity.check_float32(GPT_OSS, CASES[case], tmp_path, count=32)


@named
def test_bfloat16(case, tmp_path, rung, record_property):
    parity.check_bfloat16(GPT_OSS, CASES[case], tmp_path, record_property)


def test_caches(tmp_path):
    parity.check_caches(GPT_OSS, {}, tmp_path)


# --- MXFP4 ---


def quantized(weight):
    """(experts, columns, rows) as blocks and scales, and what they stand for: powers of two that are near enough."""
    groups = weight.transpose(0, 2, 1).reshape(len(weight), weight.shape[2], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(axis=-1))).astype(int) - 2
    scaled = groups / 2.0 ** exponents[..., None]
    codes = np.abs(scaled[..., None] - E2M1).argmin(axis=-1).astype(np.uint8)
    values = (E2M1[codes] * 2.0 ** exponents[..., None]).astype(np.float32)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    exact = values.reshape(len(weight), weight.shape[2], -1).transpose(0, 2, 1)
    return tuple(map(np.ascontiguousarray, (blocks, (exponents + 127).astype(np.uint8), exact)))


def make_mxfp4(path, dtype=torch.float32, **changes):
    """A model whose experts are exact in MXFP4, saved so; returns transformers' form of it."""
    peer = GPT_OSS.make(changes, dtype)
    save(path, peer)
    stored = load_file(path / "model.safetensors")
    for index, layer in enumerate(peer.model.layers):
        for which in ("gate_up_proj", "down_proj"):
            parameter = getattr(layer.mlp.experts, which)
            blocks, scales, exact = quantized(parameter.detach().float().numpy())
            parameter.data = torch.from_numpy(exact).to(dtype)
            name = f"model.layers.{index}.mlp.experts.{which}"
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (path / "config.json").write_text(json.dumps(config))
    return peer


def test_mxfp4_stays_so_and_gives_the_same_bits(tmp_path, rung):
    (tmp_path / "mxfp4").mkdir()
    peer = make_mxfp4(tmp_path / "mxfp4")
    save(tmp_path / "whole", peer)
    tokens = drawn(150)
    for dtype in ("float32", "bfloat16"):
        ours, whole = load(tmp_path / "mxfp4", dtype), load(tmp_path / "whole", dtype)
        for layer in ours.layers:
            assert (layer.mlp.gate_up.dtype, layer.mlp.down.dtype) == (MXFP4, MXFP4)
        assert ours.weight_bytes < whole.weight_bytes
        hidden = run(ours, tokens)
        assert np.array_equal(hidden, run(whole, tokens))
        assert np.array_equal(hidden, run(ours, tokens, [5, 37, 38, 149]))
    ours = load(tmp_path / "mxfp4", "float32")
    parity.assert_same_layers(GPT_OSS, ours, peer, tokens)
    assert_near(ours.logits(run(ours, tokens)), peer_logits(peer, tokens))


def test_mxfp4_in_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path, rung):
    peer = make_mxfp4(tmp_path, torch.bfloat16)
    tokens = drawn(150)
    model = load(tmp_path, "bfloat16")
    exact = peer_logits(GPT_OSS.with_rope(peer.float()), tokens)
    ours = errors(model.logits(run(model, tokens)), exact)
    theirs = errors(peer_logits(GPT_OSS.with_rope(peer.to(torch.bfloat16)), tokens), exact)
    assert (ours <= BF16_ERRORS * theirs).all(), ours / theirs


def test_a_step_reads_the_chosen_experts_only(tmp_path):
    save(tmp_path, GPT_OSS.make())
    model = load(tmp_path, "bfloat16")
    experts = sum(layer.mlp.gate_up.nbytes + layer.mlp.down.nbytes for layer in model.layers)
    for tokens, idle in ((1, 3 / 5), (2, 9 / 25), (100, 0)):
        unread = model.weight_bytes - model.bytes_of_step(tokens) - model.head.embedding.nbytes
        assert unread == pytest.approx(experts * idle, abs=1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gate_up_proj_scales",
            lambda array: array * 0 + 255,
            "gate_up_proj_scales .* holds 255.*: the file is damaged",
        ),
        (
            "down_proj_scales",
            lambda array: array[:, :-1].copy(),
            r"down_proj_scales has shape \(5, 63, 1\), and config",
        ),
        (
            "down_proj_blocks",
            lambda array: array.astype(np.int32),
            "down_proj_blocks is of dtype int32; supported are uint8",
        ),
    ],
)
def test_broken_mxfp4(tmp_path, name, change, message):
    make_mxfp4(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.mlp.experts.{name}"
    stored[name] = change(stored[name])
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_mxfp4_needs_whole_blocks(tmp_path):
    make_mxfp4(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 23}))
    with pytest.raises(ModelError, match="has 23 columns; MXFP4 needs multiples of 32"):
        load(tmp_path)
