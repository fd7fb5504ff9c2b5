"""Phi-3 (Abdin et al., 2024), Phi-3.5, Phi-4 and Phi-4-mini: Llama with its projections fused in the checkpoint.

Part of a head is rotated, in long texts by frequencies of their own (LongRoPE); layers may see a window.
"""

from .config import Config
from .layers import Decoder, Parts, PreNorm
from .weights import Weights


class Phi3(Decoder):
    def __init__(self, config: Config, weights: Weights) -> None:
        parts = Parts(config, weights)
        rope, window = parts.rope(), config.integer("sliding_window", 0, least=0) or None
        layers = [
            PreNorm(
                parts.rms_norm(f"{name}.input_layernorm"),
                parts.attention(f"{name}.self_attn", rope, qkv=("qkv_proj",), window=window),
                parts.rms_norm(f"{name}.post_attention_layernorm"),
                parts.gated_mlp(f"{name}.mlp", gate_up=("gate_up_proj",)),
            )
            for name in parts.layers("model.layers")
        ]
        super().__init__(parts, layers, parts.rms_norm("model.norm"))
