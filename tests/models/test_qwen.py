"""Qwen2 and Qwen3 against transformers."""

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from . import parity

SLIDING = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}
QWEN2 = parity.Family(Qwen2Config, Qwen2ForCausalLM)
QWEN3 = parity.Family(Qwen3Config, Qwen3ForCausalLM)
CASES = {
    "qwen2": (QWEN2, {}),
    "qwen2_draft_of_pard": (QWEN2, {"tie_word_embeddings": True, "pard_token": 96}),
    "qwen2_yarn": (QWEN2, {"rope_parameters": parity.YARN}),
    "qwen2_windows": (QWEN2, SLIDING),
    "qwen2_all_windows": (QWEN2, SLIDING | {"max_window_layers": 0, "num_key_value_heads": 4}),
    "qwen3": (QWEN3, {}),
    "qwen3_tied_odd": (
        QWEN3,
        {"tie_word_embeddings": True, "head_dim": 24, "num_attention_heads": 6, "hidden_size": 45},
    ),
    "qwen3_biases_windows": (QWEN3, SLIDING | {"attention_bias": True, "rope_parameters": parity.DYNAMIC}),
}
named = pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)


@named
def test_float32(family, changes, tmp_path, rung):
    parity.check_float32(family, changes, tmp_path)


@named
def test_bfloat16(family, changes, tmp_path, rung, record_property):
    parity.check_bfloat16(family, changes, tmp_path, record_property)


@named
def test_caches(family, changes, tmp_path):
    parity.check_caches(family, changes, tmp_path)
