"""GPT-J against transformers."""

import json

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from pace.errors import ModelError

from . import parity

GPTJ = parity.Family(
    GPTJConfig,
    GPTJForCausalLM,
    {"num_key_value_heads": 4, "head_dim": 18, "rotary_dim": 6},
    layers=lambda peer: peer.transformer.h,
    depth="n_layer",
    rotary=lambda peer: peer.transformer,
)
THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}
CASES = {
    "plain": {},
    "odd_sizes": THREE_HEADS | {"head_dim": 14, "hidden_size": 42, "n_inner": 77, "rotary_dim": 10},
    "all_rotated_tied": {"rotary_dim": 18, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3},
    "relu": THREE_HEADS | {"head_dim": 24, "activation_function": "relu", "rotary_dim": 2},
}
named = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


@named
def test_float32(changes, tmp_path, rung):
    parity.check_float32(GPTJ, changes, tmp_path)


@named
def test_bfloat16(changes, tmp_path, rung, record_property):
    parity.check_bfloat16(GPTJ, changes, tmp_path, record_property)


@named
def test_caches(changes, tmp_path):
    parity.check_caches(GPTJ, changes, tmp_path)


def test_old_checkpoints(tmp_path):
    """They hold the causal mask of every layer."""
    peer = GPTJ.make()
    parity.save(tmp_path / "new", peer)
    masks = {}
    for index in range(3):
        masks[f"transformer.h.{index}.attn.bias"] = torch.ones(1, 1, 300, 300, dtype=torch.uint8).tril()
        masks[f"transformer.h.{index}.attn.masked_bias"] = torch.tensor(-1e9)
    (tmp_path / "old").mkdir()
    torch.save(peer.state_dict() | masks, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    tokens = parity.drawn(40)
    logits = [
        model.logits(parity.run(model, tokens)) for model in map(parity.load, (tmp_path / "new", tmp_path / "old"))
    ]
    assert (logits[0] == logits[1]).all()


def test_real_configuration():
    """Of gpt-j-6b."""
    config = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_embd": 4096,
        "n_head": 16,
        "n_inner": None,
        "n_positions": 2048,
        "rotary": True,
        "rotary_dim": 64,
        "tie_word_embeddings": False,
        "vocab_size": 50400,
    }
    model = parity.described(GPTJ, config)
    attention = model.layers[0].attention
    assert (model.vocabulary, model.max_positions, attention.heads, attention.head_dim) == (50400, 2048, 16, 256)
    assert len(attention.rope.frequencies.usual) == 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rotary_dim": 20}, "config.json has 20 of 18 elements of a head rotated"),
        ({"rotary_dim": 5}, "config.json has 5 of 18 elements of a head rotated"),
        ({"n_layer": None}, "config.json has no num_hidden_layers"),
    ],
)
def test_what_cannot_be(change, reason, tmp_path):
    parity.save(tmp_path, GPTJ.make())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=reason):
        parity.load(tmp_path)
