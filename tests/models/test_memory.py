"""Loading keeps one copy of the weights: the pages of the file are given back on the way."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.engine.fakes import write_tokenizer

ROOT = Path(__file__).parents[2]
# A slab of 32 MB, the tokenizer, the cache's first pages and the logits; measured 12 MB when loaded, 41 MB later.
SLACK = 100e6

CONFIG = {
    "model_type": "llama",
    "vocab_size": 24000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}

# VmHWM and not getrusage, whose maximum a child process takes over from its parent.
CHILD = """
import sys
from pace import LLM, SamplingParams

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
llm = LLM(sys.argv[1], dtype=sys.argv[2], kv_cache_bytes=64 << 20)
loaded = peak()
llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
print(before, loaded, peak(), llm.model.weight_bytes)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """About 300 MB of bfloat16."""
    path = tmp_path_factory.mktemp("big")
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    some = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(ml_dtypes.bfloat16)
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.self_attn.{which}_proj": (hidden, hidden) for which in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{which}_proj": (inner, hidden) for which in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (hidden, inner)
        shapes |= {f"model.layers.{layer}.{which}_layernorm": (hidden,) for which in ("input", "post_attention")}
    save_file({f"{name}.weight": np.resize(some, shape) for name, shape in shapes.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(path)
    yield path
    (path / "model.safetensors").unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc: for Linux")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_copy_of_the_weights(big, dtype, record_property):
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(big), dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    before, loaded, after, weights = map(int, run.stdout.split())
    record_property("MB above the weights", ((loaded - before - weights) / 1e6, (after - before - weights) / 1e6))
    assert weights > 2 * SLACK  # a second copy would show
    assert loaded - before <= weights + SLACK
    assert after - before <= weights + SLACK
