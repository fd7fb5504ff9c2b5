"""Qwen3 (Qwen team, 2025): Llama with norms of queries and keys."""

from .config import Config
from .layers import Decoder, Parts, PreNorm
from .qwen2 import windows
from .weights import Weights


class Qwen3(Decoder):
    def __init__(self, config: Config, weights: Weights) -> None:
        parts = Parts(config, weights)
        bias, rope = config.flag("attention_bias", False), parts.rope()
        layers = [
            PreNorm(
                parts.rms_norm(f"{name}.input_layernorm"),
                parts.attention(f"{name}.self_attn", rope, bias, out_bias=bias, head_norms=True, window=window),
                parts.rms_norm(f"{name}.post_attention_layernorm"),
                parts.gated_mlp(f"{name}.mlp"),
            )
            for name, window in zip(parts.layers("model.layers"), windows(config), strict=True)
        ]
        super().__init__(parts, layers, parts.rms_norm("model.norm"))
