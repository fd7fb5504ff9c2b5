"""Llama (Touvron et al., 2023; Grattafiori et al., 2024) and its kin: SmolLM2, DeepSeek-R1-Distill."""

from .config import Config
from .layers import Decoder, Parts, PreNorm
from .weights import Weights


class Llama(Decoder):
    def __init__(self, config: Config, weights: Weights) -> None:
        parts = Parts(config, weights)
        bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
        rope = parts.rope()
        layers = [
            PreNorm(
                parts.rms_norm(f"{name}.input_layernorm"),
                parts.attention(f"{name}.self_attn", rope, bias, out_bias=bias),
                parts.rms_norm(f"{name}.post_attention_layernorm"),
                parts.gated_mlp(f"{name}.mlp", mlp_bias),
            )
            for name in parts.layers("model.layers")
        ]
        super().__init__(parts, layers, parts.rms_norm("model.norm"))
