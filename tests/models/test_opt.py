"""OPT against transformers."""

import json

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from pace.errors import ModelError

from . import parity

OPT = parity.Family(
    OPTConfig,
    OPTForCausalLM,
    {"num_key_value_heads": 4, "head_dim": 18, "ffn_dim": 131, "init_std": 0.15, "tie_word_embeddings": True},
    layers=lambda peer: peer.model.decoder.layers,
)
AFTER = {"do_layer_norm_before": False}
CASES = {
    "before": {},
    "after_projected": AFTER | {"word_embed_proj_dim": 37},
    "after_gelu_untied": AFTER | {"activation_function": "gelu", "tie_word_embeddings": False},
    "before_projected_bare": {
        "activation_function": "gelu_new",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
        "word_embed_proj_dim": 101,
    },
    "no_last_norm": {
        "_remove_final_layer_norm": True,
        "hidden_size": 42,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "activation_function": "silu",
    },
}
named = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


@named
def test_float32(changes, tmp_path, rung):
    parity.check_float32(OPT, changes, tmp_path)


@named
def test_bfloat16(changes, tmp_path, rung, record_property):
    parity.check_bfloat16(OPT, changes, tmp_path, record_property)


@named
def test_caches(changes, tmp_path):
    parity.check_caches(OPT, changes, tmp_path)


def test_every_position(tmp_path):
    """To the last row of the table, and none beyond."""
    peer = OPT.make({"max_position_embeddings": 60})
    parity.save(tmp_path, peer)
    model, tokens = parity.load(tmp_path), parity.drawn(60)
    assert model.max_positions == 60
    parity.assert_near(model.logits(parity.run(model, tokens)), parity.peer_logits(peer, tokens))
    with pytest.raises(ValueError, match="sequence 0 would have 61 tokens; the longest may have 60"):
        parity.run(model, [*tokens, 1])


def test_old_checkpoints(tmp_path):
    """`decoder.` in place of `model.decoder.`, no head, and in some fairseq's version; float16 in pytorch_model.bin."""
    peer = OPT.make(CASES["after_projected"])
    parity.save(tmp_path / "new", peer)
    weights = {name.removeprefix("model."): value.half() for name, value in peer.state_dict().items()}
    del weights["lm_head.weight"]
    (tmp_path / "old").mkdir()
    torch.save(weights | {"decoder.version": torch.tensor([3.0])}, tmp_path / "old" / "pytorch_model.bin")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    tokens = parity.drawn(40)
    new, old = (parity.load(tmp_path / which, "float32") for which in ("new", "old"))
    # Weights of bfloat16 are exact in float16 too, but for those below its range, which lose 3e-8 at most.
    parity.assert_near(old.logits(parity.run(old, tokens)), new.logits(parity.run(new, tokens)))


OPT_125M = {
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
LARGER = {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048}
REAL = {
    "125m": (OPT_125M, "PreNorm"),
    "350m": (
        OPT_125M
        | {
            "do_layer_norm_before": False,
            "ffn_dim": 4096,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
        },
        "PostNorm",
    ),
    "1.3b": (OPT_125M | LARGER, "PreNorm"),
    "6.7b": (OPT_125M | LARGER | {"ffn_dim": 16384, "hidden_size": 4096, "word_embed_proj_dim": 4096}, "PreNorm"),
    "galactica-1.3b": (
        OPT_125M | LARGER | {"activation_function": "gelu", "enable_bias": False, "vocab_size": 50000},
        "PreNorm",
    ),
}


@pytest.mark.parametrize(("config", "layer"), REAL.values(), ids=REAL)
def test_real_configurations(config, layer):
    model = parity.described(OPT, config)
    assert type(model.layers[0]).__name__ == layer
    assert (model.norm is None) == (layer == "PostNorm")
    assert model.head.embedding is model.head.head
    assert model.vocabulary == config["vocab_size"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation_function": "tanh"}, "activation_function in config.json is 'tanh'; supported are silu"),
        ({"max_position_embeddings": 299}, r"embed_positions.weight has shape \(302, 72\), and config.json makes it"),
        ({"word_embed_proj_dim": 40}, "tensor model.decoder.project_in.weight is not there"),
    ],
)
def test_what_cannot_be(change, reason, tmp_path):
    parity.save(tmp_path, OPT.make())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=reason):
        parity.load(tmp_path)
