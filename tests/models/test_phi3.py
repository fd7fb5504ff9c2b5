"""Phi-3 against transformers."""

import json

import pytest
from transformers import Phi3Config, Phi3ForCausalLM

from pace.errors import ModelError

from . import parity

LONG = {"original_max_position_embeddings": 64}
PARTIAL = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True}
PHI3 = parity.Family(Phi3Config, Phi3ForCausalLM, {"head_dim": 18})
CASES = {
    "plain": {"num_key_value_heads": 4},
    "odd_sizes_window": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 54, "sliding_window": 19},
    "partial_tied": PARTIAL | {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.75}},
    "partial_longrope": PARTIAL | LONG | {"rope_parameters": parity.longrope(9, partial_rotary_factor=0.75)},
    "longrope_window": LONG | {"rope_parameters": parity.longrope(9), "sliding_window": 40},
}
named = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


@named
def test_float32(changes, tmp_path, rung):
    """The text goes from 20 to 84 tokens, past the 64 that LongRoPE's short factors are for."""
    parity.check_float32(PHI3, changes, tmp_path, anew=True)


@named
def test_bfloat16(changes, tmp_path, rung, record_property):
    parity.check_bfloat16(PHI3, changes, tmp_path, record_property)


@named
def test_caches(changes, tmp_path):
    parity.check_caches(PHI3, changes, tmp_path)


def test_config_of_the_first_checkpoints(tmp_path):
    """`su`, and what belongs to rotary positions beside `rope_scaling`; where it ends the short factors too."""
    peer = PHI3.make(CASES["partial_longrope"])
    parity.save(tmp_path, peer, old_rope=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        config[key] = config["rope_scaling"].pop(key)
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type").replace("longrope", "su")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = parity.load(tmp_path)
    assert (model.stretched_beyond, model.stretched_whole) == (64, True)
    for length in (64, 65):
        tokens = parity.drawn(length)
        parity.assert_near(model.logits(parity.run(model, tokens)), parity.peer_logits(peer, tokens))


PHI3_MINI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.1] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
REAL = {
    "phi-3-mini-4k": (
        PHI3_MINI | {"max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047},
        (4096, None, 2047, 96, 48),
    ),
    "phi-3-mini-128k": (PHI3_MINI, (131072, 4096, 262144, 96, 48)),
    "phi-4": (
        {
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "max_position_embeddings": 16384,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384,
            "rope_scaling": None,
            "rope_theta": 250000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 100352,
        },
        (16384, None, None, 128, 64),
    ),
    "phi-4-mini": (
        PHI3_MINI
        | {
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        (131072, 4096, 262144, 128, 48),
    ),
}


@pytest.mark.parametrize(("config", "expected"), REAL.values(), ids=REAL)
def test_real_configurations(config, expected):
    model = parity.described(PHI3, config)
    attention = model.layers[0].attention
    pairs = len(attention.rope.frequencies.usual)
    assert (model.max_positions, model.stretched_beyond, attention.window, attention.head_dim, pairs) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"partial_rotary_factor": 0.73}, "config.json has 35 of 48 elements of a head rotated"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "has short_factor None; longrope needs 24 numb"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_type is 'ntk'; supported are default, linear"),
        ({"sliding_window": "wide"}, "sliding_window in config.json is 'wide'; it must be an integer of 0 or more"),
    ],
)
def test_what_cannot_be(change, reason, tmp_path):
    peer = PHI3.make({"num_key_value_heads": 4, "head_dim": 48})
    parity.save(tmp_path, peer, old_rope=True)
    config = json.loads((tmp_path / "config.json").read_text())
    if "partial_rotary_factor" in change:
        config["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=reason):
        parity.load(tmp_path)
