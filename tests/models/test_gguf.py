import contextlib
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pace.errors import ModelError
from pace.models.checkpoint import open_checkpoint
from pace.models.config import Config
from pace.models.gguf import GGUFFile
from pace.models.rope import Rotary

from .tiny import LLAMA, arrays, llama, write_gguf

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1]


def as_stored(array, kind):
    """What an array is after it has been written as `kind`."""
    return array if array.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_tensors(tmp_path, kind):
    model = llama()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", model, kind))
    expected = arrays(model)
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, array in expected.items():
        stored = as_stored(array, kind)
        read = checkpoint.read(name)
        assert checkpoint.shape(name) == array.shape
        assert read.dtype == checkpoint.dtype(name)
        assert not read.flags.writeable
        assert np.array_equal(read.astype(np.float32), stored), name
        assert np.array_equal(checkpoint.read_rows(name, 5, 23).astype(np.float32), stored[5:23])
        assert checkpoint.read_rows(name, 4, 4).shape == (0, *array.shape[1:])
        checkpoint.release(name)


def test_plain_tensors_are_views(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", llama(), Kind.BF16))
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.shares_memory(checkpoint.read(name), checkpoint.read_rows(name, 2, 3))


def test_config(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", llama()))
    assert LLAMA.items() <= checkpoint.config.items()
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 7]}


def test_tied_embeddings(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", llama(tie_word_embeddings=True)))
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.names()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def factors_of(config):
    """llama.cpp's rope_freqs: what each frequency is divided by."""
    head_dim = config.head_dim
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / scaled).numpy()


def test_rope_of_llama3(tmp_path):
    model = llama(rope_parameters=LLAMA3, head_dim=64)
    path = write_gguf(tmp_path / "tiny.gguf", model, rope_factors=factors_of(model.config))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_parameters"] == LLAMA3
    assert "rope_freqs.weight" not in checkpoint.names()


def test_rope_of_other_factors(tmp_path):
    factors = [1, 1.5, 2, 2.5, 3, 4, 5, 6]
    path = write_gguf(tmp_path / "tiny.gguf", llama(), rope_factors=factors)
    assert_refused(path, "rope_freqs that are not Llama 3's: only those are supported")


def test_rope_scaled_otherwise(tmp_path):
    kind = SimpleNamespace(value="ntk")
    path = write_gguf(tmp_path / "tiny.gguf", llama(), metadata=[("add_rope_scaling_type", kind)])
    assert_refused(path, "scales RoPE by 'ntk': none, linear, yarn, longrope are supported")


def test_rope_of_more_than_a_head(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", llama(), metadata=[("add_rope_dimension_count", 18)])
    assert_refused(path, "rotates 18 of 16 elements of a head: download it again")


def test_rope_scaled_linearly(tmp_path):
    scaling = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", llama(), metadata=scaling))
    assert checkpoint.config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}


def test_header_says_what_the_gguf_package_says(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", llama(), Kind.Q8_0)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == pytest.approx(field.contents())
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].offset == tensor.data_offset
        assert ours.tensors[tensor.name].num_bytes == tensor.n_bytes


def assert_refused(path, match):
    with pytest.raises(ModelError, match=match) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_not_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGML" * 10)
    assert_refused(tmp_path / "model.gguf", "is not a GGUF file")


def test_other_architecture(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", llama(), architecture="mamba")
    assert_refused(path, "is of architecture 'mamba': GGUF files of llama")


def test_yarn_of_a_logarithm(tmp_path):
    """llama.cpp: get_mscale(factor, 1) / get_mscale(factor, yarn_log_multiplier)."""
    scaling = [
        ("add_rope_scaling_type", gguf.RopeScalingType.YARN),
        ("add_rope_scaling_factor", 4.0),
        ("add_rope_scaling_orig_ctx_len", 128),
        ("add_rope_scaling_yarn_log_mul", 0.5),
    ]
    config = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", llama(), metadata=scaling)).config
    expected = (0.1 * np.log(4) + 1) / (0.1 * 0.5 * np.log(4) + 1)
    assert Rotary.of(Config(config), config["head_dim"]).frequencies().scale == pytest.approx(expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama(), Kind.Q8_0).read_bytes()


@settings(max_examples=60)
@given(data=st.data())
def test_truncated_anywhere(tmp_path, whole, data):
    keep = data.draw(st.one_of(st.integers(4, 2000), st.integers(4, len(whole) - 1)))
    path = tmp_path / "cut.gguf"
    # The last tensor is followed by up to a block of padding, which nobody misses.
    path.write_bytes(whole[: min(keep, len(whole) - 33)])
    assert_refused(path, "is corrupt or cut short .*: download it again")


@settings(max_examples=200)
@given(at=st.integers(4, 1500), value=st.integers(0, 255))
def test_a_wrong_byte_in_the_header_is_an_error_or_harmless(tmp_path, whole, at, value):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    with contextlib.suppress(ModelError):
        open_checkpoint(path)


def test_smollm2(smollm2):
    checkpoint = open_checkpoint(smollm2)
    config = checkpoint.config
    shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    assert [config[key] for key in shape] == [30, 9, 3, 64, 49152]
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    rows = checkpoint.read_rows("model.embed_tokens.weight", 100, 164)
    assert rows.shape == (64, 576)
    assert np.array_equal(rows, checkpoint.read("model.embed_tokens.weight")[100:164])
    assert 0.01 < rows.std() < 1
