"""Gemma 3 (Gemma team, 2025): local layers and global ones, each with its own rotary positions, four norms a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pace.cache import KVCache, Placement
from pace.errors import ModelError
from pace.reference.arrays import Array

from .config import Config
from .layers import Decoder, FeedForward, Norm, Parts, SelfAttention, norm_of_sum
from .weights import Weights

# What config.json means where it says nothing: those of the multimodal models name a few keys only.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
}


class Gemma3Text(Decoder):
    def __init__(self, config: Config, weights: Weights, name: str = "model", head: str = "lm_head") -> None:
        """name, head: of the tensors."""
        config = self.usual(config)
        if config.flag("use_bidirectional_attention", False):
            raise ModelError("use_bidirectional_attention in config.json is true: only causal models are supported")
        parts = Parts(config, weights)
        bias = config.flag("attention_bias", False)
        scale = config.number("query_pre_attn_scalar") ** -0.5
        local, wide = parts.rope(rotary(config, "sliding_attention")), parts.rope(rotary(config, "full_attention"))
        layers = [
            FourNorms(
                parts.rms_norm(f"{layer}.input_layernorm", offset=1),
                parts.attention(
                    f"{layer}.self_attn",
                    wide if window is None else local,
                    bias,
                    out_bias=bias,
                    head_norms=True,
                    norm_offset=1,
                    scale=scale,
                    window=window,
                    softcap=softcap(config, "attn_logit_softcapping"),
                ),
                parts.rms_norm(f"{layer}.post_attention_layernorm", offset=1),
                parts.rms_norm(f"{layer}.pre_feedforward_layernorm", offset=1),
                parts.gated_mlp(f"{layer}.mlp", activation="hidden_activation"),
                parts.rms_norm(f"{layer}.post_feedforward_layernorm", offset=1),
            )
            for layer, window in zip(parts.layers(f"{name}.layers"), windows(config), strict=True)
        ]
        super().__init__(
            parts,
            layers,
            parts.rms_norm(f"{name}.norm", offset=1),
            f"{name}.embed_tokens",
            head,
            embedding_scale=parts.hidden**0.5,
            softcap=softcap(config, "final_logit_softcapping"),
        )

    @classmethod
    def usual(cls, config: Config) -> Config:
        given = {key: value for key, value in config.text.values.items() if value is not None}
        return Config({**DEFAULTS, **given})


@dataclass(frozen=True)
class FourNorms:
    """Norms before and after each of the two blocks."""

    attention_norm: Norm
    attention: SelfAttention
    after_attention: Norm
    mlp_norm: Norm
    mlp: FeedForward
    after_mlp: Norm

    def __call__(
        self, residual: Array, delta: Array | None, index: int, placement: Placement, cache: KVCache
    ) -> tuple[Array, Array | None]:
        x = norm_of_sum(self.attention_norm, residual, delta)
        delta = self.after_attention(self.attention(x, index, placement, cache))
        return residual, self.after_mlp(self.mlp(self.mlp_norm(delta, residual)))


def windows(config: Config) -> list[int | None]:
    """How far each layer sees: of `sliding_window_pattern` layers the last sees all."""
    pattern = config.integer("sliding_window_pattern")
    return config.windows(config.integer("sliding_window"), lambda index: (index + 1) % pattern != 0)


def rotary(config: Config, kind: str) -> dict[str, Any]:
    """Settings of the layers of one kind; before transformers 5, `rope_scaling` was that of the global ones."""
    wide = kind == "full_attention"
    theta = config.number("rope_theta" if wide else "rope_local_base_freq")
    scaling = config.values.get("rope_scaling") if wide else None
    own = (config.values.get("rope_parameters") or {}).get(kind)
    return {"rope_theta": theta, **(scaling or {}), **(own or {})}


def softcap(config: Config, key: str) -> float | None:
    return None if config.values.get(key) is None else config.number(key)
