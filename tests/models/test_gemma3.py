"""Gemma 3 against transformers: small random ones of awkward shapes, and gemma-3-270m."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from . import parity


class GemmaFamily(parity.Family):
    def with_rope(self, peer):
        """And its scale of embeddings in float32, as from_pretrained keeps it too: the model rounds it to its dtype."""
        for module in peer.modules():
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale)
        return super().with_rope(peer)


# Windows shorter than the prompts; rotary positions whose kinds of layers differ; scores not scaled by head_dim.
BASE = {
    "sliding_window": 19,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
GEMMA = GemmaFamily(Gemma3TextConfig, Gemma3ForCausalLM, BASE)
CASES = {
    "plain": {},
    "untied_odd": {
        "tie_word_embeddings": False,
        "hidden_size": 45,
        "intermediate_size": 77,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "attention_bias": True,
    },
    "layer_types": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "num_key_value_heads": 1,
        "head_dim": 40,
        "rope_parameters": {"full_attention": parity.YARN},
    },
    "softcaps": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
}
named = pytest.mark.parametrize("case", CASES)


@named
def test_float32(case, tmp_path, rung):
    parity.check_float32(GEMMA, CASES[case], tmp_path, count=40)
