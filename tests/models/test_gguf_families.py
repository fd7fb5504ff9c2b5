"""GGUF files of each family hold what its Hugging Face directory holds."""

import json

import gguf
import numpy as np
import pytest
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pace.errors import ModelError
from pace.models import MODELS
from pace.models.checkpoint import open_checkpoint
from pace.models.gguf import GGUFFile

from . import parity
from .tiny import arrays, write_gguf

LLAMA = parity.Family(LlamaConfig, LlamaForCausalLM)
QWEN2 = parity.Family(Qwen2Config, Qwen2ForCausalLM)
QWEN3 = parity.Family(Qwen3Config, Qwen3ForCausalLM)
# hidden_size is heads * head_dim. Factors are exact in float32, as GGUF has them.
PHI3 = parity.Family(
    Phi3Config,
    Phi3ForCausalLM,
    {"hidden_size": 64, "original_max_position_embeddings": 300, "sliding_window": None},
)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.125, 1.25, 1.5, 1.75, 2.0],
    "long_factor": [1.0, 2.5, 4.0, 8.0, 9.5, 11.0],
    "partial_rotary_factor": 0.75,
}
GPT_OSS = parity.Family(
    GptOssConfig,
    GptOssForCausalLM,
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 19,
        "num_hidden_layers": 3,
        "rope_parameters": parity.YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
)
CASES = {
    "llama_biases": (LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (QWEN2, {}),
    "qwen2_tied_yarn": (QWEN2, {"tie_word_embeddings": True, "rope_parameters": parity.YARN}),
    "qwen2_yarn_attention": (QWEN2, {"rope_parameters": parity.YARN | {"attention_factor": 1.5, "beta_fast": 16.0}}),
    "qwen3": (QWEN3, {"head_dim": 24}),
    "phi3": (PHI3, {"sliding_window": 19}),
    "phi3_longrope": (PHI3, {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "gpt_oss": (GPT_OSS, {}),
}
SAID = {
    *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "rope_parameters", "hidden_act", "dtype"),
}
SAID_BY = {
    "llama": {"attention_bias", "mlp_bias", "head_dim"},
    "qwen3": {"head_dim"},
    "phi3": {"original_max_position_embeddings"},
    "gpt_oss": {
        *("attention_bias", "head_dim", "sliding_window", "layer_types"),
        *("num_local_experts", "num_experts_per_tok", "swiglu_limit"),
    },
}
named = pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)


def both(family, changes, path):
    peer = family.make(changes)
    parity.save(path / "hf", peer)
    write_gguf(path / "tiny.gguf", peer)
    return open_checkpoint(path / "hf"), open_checkpoint(path / "tiny.gguf")


@named
def test_tensors(family, changes, tmp_path):
    theirs, ours = both(family, changes, tmp_path)
    assert sorted(ours.names()) == sorted(theirs.names())
    for name in theirs.names():
        expected = theirs.read(name)
        assert ours.shape(name) == expected.shape, name
        assert ours.dtype(name) == expected.dtype
        assert np.array_equal(ours.read(name), expected), name
        assert np.array_equal(ours.read_rows(name, 1, 2), expected[1:2]), name
        assert ours.read_rows(name, 1, 1).shape == (0, *expected.shape[1:])
        ours.release(name)


@named
def test_config(family, changes, tmp_path):
    _, ours = both(family, changes, tmp_path)
    theirs = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert ours.config.keys() >= SAID | SAID_BY.get(theirs["model_type"], set())
    for key in ours.config.keys() & theirs.keys() - {"rope_parameters"}:
        assert ours.config[key] == theirs[key] or theirs[key] is None, key
    assert ours.config.get("sliding_window") == (theirs.get("sliding_window"))
    rope = {"partial_rotary_factor": 1.0} | ours.config["rope_parameters"]
    assert {key: rope.get(key) for key, value in theirs["rope_parameters"].items()} == theirs["rope_parameters"]


@named
def test_logits(family, changes, tmp_path):
    if family.config.model_type not in MODELS:
        pytest.skip(f"pace has no {family.config.model_type}")
    both(family, changes, tmp_path)
    tokens = parity.drawn(90)
    theirs, ours = (parity.load(tmp_path / name) for name in ("hf", "tiny.gguf"))
    assert np.array_equal(ours.logits(parity.run(ours, tokens)), theirs.logits(parity.run(theirs, tokens)))


def quantised(peer):
    """GPT-OSS's tensors with MXFP4 experts, in Hugging Face's layout."""
    random, tensors = np.random.default_rng(0), arrays(peer)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = random.integers(0, 256, (*shape, 16), np.uint8)
        tensors[f"{name}_scales"] = random.integers(118, 130, shape, np.uint8)
    return tensors


def test_mxfp4(tmp_path):
    peer = GPT_OSS.make()
    tensors = quantised(peer)
    ours = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", peer, tensors=tensors))
    assert sorted(ours.names()) == sorted(tensors)
    for name, expected in tensors.items():
        assert (ours.shape(name), ours.dtype(name)) == (expected.shape, expected.dtype)
        assert np.array_equal(ours.read(name), expected), name
        assert np.array_equal(ours.read_rows(name, 1, 3), expected[1:3]), name


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def test_mxfp4_means_what_the_gguf_package_says(tmp_path):
    peer = GPT_OSS.make()
    path = write_gguf(tmp_path / "tiny.gguf", peer, tensors=quantised(peer))
    name = "model.layers.1.mlp.experts.down_proj"
    with open_checkpoint(path) as ours:
        blocks, scales = ours.read(f"{name}_blocks"), ours.read(f"{name}_scales")
    elements = FP4[np.stack((blocks & 15, blocks >> 4), -1)].reshape(*scales.shape, 32)
    values = np.ldexp(elements, scales[..., None].astype(np.int32) - 127).reshape(*scales.shape[:2], -1)
    (stored,) = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down_exps.weight"]
    assert np.array_equal(values, gguf.dequantize(stored.data, stored.tensor_type))


def test_experts_without_their_other_half(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", GPT_OSS.make())
    assert "blk.0.ffn_up_exps.weight" in GGUFFile(path).tensors
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_up_exps.weight", b"blk.9.ffn_up_exps.weight"))
    with pytest.raises(ModelError, match=r"has no tensor 'blk\.0\.ffn_up_exps\.weight': the file is not complete"):
        open_checkpoint(path)
