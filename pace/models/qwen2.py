"""Qwen2 (Yang et al., 2024), Qwen2.5, DeepSeek-R1-Distill-Qwen: Llama with biases of queries, keys and values."""

from .config import Config
from .layers import Decoder, Parts, PreNorm
from .weights import Weights


class Qwen2(Decoder):
    def __init__(self, config: Config, weights: Weights) -> None:
        parts = Parts(config, weights)
        rope = parts.rope()
        layers = [
            PreNorm(
                parts.rms_norm(f"{name}.input_layernorm"),
                parts.attention(f"{name}.self_attn", rope, bias=True, window=window),
                parts.rms_norm(f"{name}.post_attention_layernorm"),
                parts.gated_mlp(f"{name}.mlp"),
            )
            for name, window in zip(parts.layers("model.layers"), windows(config), strict=True)
        ]
        super().__init__(parts, layers, parts.rms_norm("model.norm"))


def windows(config: Config) -> list[int | None]:
    """How far each layer sees: with `use_sliding_window`, those from `max_window_layers` on see `sliding_window`."""
    full = config.integer("max_window_layers", 28, least=0)
    window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    return config.windows(window, lambda index: index >= full)
