"""Checkpoints made of a config.json alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from pace.errors import ModelError
from pace.models import MODELS, load_model
from pace.models.random_weights import (
    BLOCK,
    CODE_RMS,
    RandomCheckpoint,
    num_layers,
    num_weights,
    random_checkpoint,
    with_layers,
)
from pace.reference.arrays import bfloat16, float32

from .parity import BASE
from .test_memory import CONFIG, ROOT, SLACK

CONFIGS = ROOT / "benchmarks" / "configs"
# As their cards and papers have it; gpt-oss-20b with MXFP4's codes, Gemma 3 4B with its eyes.
WEIGHTS = {
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "gemma-3-4b": 4_300_079_472,
    "gpt-oss-20b": 20_914_757_184,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "opt-1.3b": 1_315_758_080,
    "phi-4-mini": 3_836_021_760,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


@pytest.fixture
def config(tmp_path):
    """Writes a small config.json."""

    def write(**values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(BASE | values))
        return path

    return write


def whole(shape, name="a.weight", dtype=float32, seed=0):
    return RandomCheckpoint(Path("config.json"), {}, {name: shape}, dtype, seed).read(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_a_checkpoint(family, config):
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASE, **FAMILIES[family]))
    tied = made.config.tie_word_embeddings
    expected = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    checkpoint = random_checkpoint(config(model_type=family, **FAMILIES[family]))
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == {
        name: shape for name, shape in expected.items() if not (tied and name == "lm_head.weight")
    }
    load_model(checkpoint)  # which checks each of them


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_configurations_are_those_of_the_models(name):
    path = CONFIGS / f"{name}.json"
    if (kind := json.loads(path.read_text())["model_type"]) not in MODELS:
        pytest.skip(f"there is no {kind} yet")
    checkpoint = random_checkpoint(path)
    assert sum(num_weights(each, checkpoint.shape(each)) for each in checkpoint.names()) == WEIGHTS[name]


def test_every_configuration_is_checked():
    assert {path.stem for path in CONFIGS.glob("*.json")} == WEIGHTS.keys()


def test_rows_are_those_of_the_whole():
    shape = 7, BLOCK // 3  # more than the block, and not a multiple of it
    checkpoint = RandomCheckpoint(Path("config.json"), {}, {"a.weight": shape}, bfloat16, 0)
    tensor = checkpoint.read("a.weight")
    assert tensor.shape == shape
    for start, stop in ((0, 1), (2, 6), (6, 9), (3, 3)):
        assert (checkpoint.read_rows("a.weight", start, stop) == tensor[start:stop]).all()
    with pytest.raises(ValueError, match="read-only"):
        tensor[0] = 0


def test_the_seed_and_the_name_say_what_a_tensor_is():
    tensor = whole((50, 96))
    assert (whole((50, 96)) == tensor).all()
    assert (whole((50, 96), seed=1) != tensor).any()
    assert (whole((50, 96), name="b.weight") != tensor).any()


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
@pytest.mark.parametrize("columns", [64, 2048])
def test_the_scale_is_that_of_the_fan_in(dtype, columns):
    tensor = whole((512, columns), dtype=dtype)
    assert tensor.dtype == dtype
    # The deviation of 32768 numbers is within 0.4 % (one sigma) of that of all.
    assert tensor.astype(np.float32).std() * columns**0.5 == pytest.approx(1, rel=0.02)


def test_no_two_rows_are_alike():
    # Dot products of independent rows of 1024 are of the deviation 1/32; these are 4950 pairs.
    rows = whole((100, 1024))
    assert np.abs(rows @ rows.T - np.diag((rows * rows).sum(1))).max() < 5 / 32


def test_norms_keep_what_they_are_given():
    assert (whole((64,), name="model.norm.weight") == 1).all()
    assert whole((64,), name="q_proj.bias").std() == pytest.approx(1 / 8, rel=0.5)


@pytest.mark.parametrize("columns", [64, 2880, 8192])
def test_mxfp4_has_the_scale_of_the_fan_in(columns):
    blocks = whole((8, 64, columns // 32, 16), name="experts.up_proj_blocks")
    scales = whole((8, 64, columns // 32), name="experts.up_proj_scales")
    assert blocks.dtype == scales.dtype == np.uint8
    assert len(np.unique(blocks)) == 256
    # The scale is a power of two: at most √2 too large or too small.
    assert 0.7 < CODE_RMS * 2.0 ** (int(scales.max()) - 127) * columns**0.5 < 1.42
    assert num_weights("experts.up_proj_blocks", blocks.shape) == 8 * 64 * columns
    assert num_weights("experts.up_proj_scales", scales.shape) == 0


def test_fewer_layers():
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "vocab_size": 7}
    assert with_layers(config, 2) == {"num_hidden_layers": 2, "layer_types": ["a", "b"], "vocab_size": 7}
    assert with_layers({"n_layer": 4}, 1) == {"n_layer": 1}
    assert with_layers({"text_config": config}, 4) == {"text_config": config}
    assert with_layers({}, 3) == {"num_hidden_layers": 3}  # where the default is the family's
    with pytest.raises(ValueError, match="layers is 5; the model has 1 to 4"):
        with_layers(config, 5)


def test_the_number_of_layers():
    for config, number in (({"num_hidden_layers": 4}, 4), ({"text_config": {"n_layer": 3}}, 3), ({}, 1)):
        assert num_layers(config) == number


def test_what_no_model_can_be_made_of(config, tmp_path):
    with pytest.raises(ModelError, match=r"no config.json at .*nowhere"):
        random_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is 'mamba'; supported are"):
        random_checkpoint(config(model_type="mamba"))
    with pytest.raises(ModelError, match=r"num_hidden_layers in config.json is 'many'"):
        random_checkpoint(config(model_type="llama", num_hidden_layers="many"))
    with pytest.raises(ValueError, match="dtype is 'int3'"):
        random_checkpoint(config(model_type="llama"), "int3")
    with pytest.raises(ModelError, match=r"no part of the model asks for 'model.eyes'"):
        random_checkpoint(config(model_type="llama")).shape("model.eyes")


def test_the_dtype_is_that_of_load_model(config):
    for asked, stated, expected in (
        ("auto", {}, bfloat16),
        ("auto", {"torch_dtype": "float32"}, float32),
        ("auto", {"dtype": "float16"}, bfloat16),
        ("float32", {"torch_dtype": "bfloat16"}, float32),
    ):
        checkpoint = random_checkpoint(config(model_type="llama", **stated), asked)
        assert checkpoint.dtype("model.norm.weight") == load_model(checkpoint, asked).dtype == expected


CHILD = """
import sys
from pace.bench import peak_bytes
from pace.models import load_model
from pace.models.random_weights import random_checkpoint
before = peak_bytes()
model = load_model(random_checkpoint(sys.argv[1]))
print(before, peak_bytes(), model.weight_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc: for Linux")
def test_nothing_is_kept_but_what_is_packed(tmp_path, record_property):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    run = subprocess.run([sys.executable, "-c", CHILD, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    before, loaded, weights = map(int, run.stdout.split())
    record_property("MB above the weights", (loaded - before - weights) / 1e6)
    assert weights > 2 * SLACK  # a second copy would show
    assert loaded - before <= weights + SLACK
