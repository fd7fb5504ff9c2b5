"""Llama (Touvron et al., 2023; Grattafiori et al., 2024) and its kin: SmolLM2, DeepSeek-R1-Distill."""

from dataclasses import dataclass

from pace.cache import CacheShape, KVCache, Placement
from pace.cache.base import Ints
from pace.ops import GatedMLP, RMSNorm, RoPE
from pace.reference.arrays import Array, Float

from .base import Model
from .config import Config
from .layers import RopeParameters, SelfAttention
from .weights import Weights


@dataclass(frozen=True)
class Layer:
    attention_norm: RMSNorm
    attention: SelfAttention
    mlp_norm: RMSNorm
    mlp: GatedMLP


class Llama(Model):
    """Pre-norm layers; the residual stream is kept in the model's dtype, and each norm adds to it what came before."""

    def __init__(self, config: Config, weights: Weights) -> None:
        hidden = config.integer("hidden_size")
        heads, kv_heads, head_dim = config.heads(hidden)
        layers, eps = config.integer("num_hidden_layers"), config.number("rms_norm_eps", 1e-6)
        bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
        inner, activation = config.integer("intermediate_size"), config.activation("hidden_act", "silu")
        self.dtype = weights.dtype
        self.vocabulary = config.integer("vocab_size")
        self.max_positions = config.integer("max_position_embeddings")
        self.cache_shape = CacheShape(layers, kv_heads, head_dim, weights.dtype, self.max_positions)
        tied = config.flag("tie_word_embeddings", False)
        self.head = weights.lm_head("model.embed_tokens.weight", "lm_head.weight", self.vocabulary, hidden, tied)
        frequencies = RopeParameters.of(config.values).frequencies(head_dim)
        rope = RoPE(weights.operators, weights.dtype, frequencies, self.max_positions)

        def layer(index: int) -> Layer:
            name = f"model.layers.{index}"
            q, k, v, o = (f"{name}.self_attn.{which}_proj" for which in "qkvo")
            gate, up, down = (f"{name}.mlp.{which}_proj" for which in ("gate", "up", "down"))
            rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
            attention = SelfAttention(
                weights.linear("qkv_projection", [q, k, v], rows, hidden, bias),
                weights.linear("out_projection", [o], [hidden], heads * head_dim, bias),
                rope,
                heads,
                kv_heads,
                head_dim,
                scale=head_dim**-0.5,
            )
            return Layer(
                weights.rms_norm(f"{name}.input_layernorm", hidden, eps),
                attention,
                weights.rms_norm(f"{name}.post_attention_layernorm", hidden, eps),
                weights.gated_mlp(gate, up, down, hidden, inner, activation, mlp_bias),
            )

        self.layers = [layer(index) for index in range(layers)]
        self.norm = weights.rms_norm("model.norm", hidden, eps)
        self.weight_bytes = weights.nbytes
        self.bytes_per_step = weights.nbytes - (0 if tied else self.head.embedding.nbytes)

    def forward(self, tokens: Ints, placement: Placement, cache: KVCache) -> Array:
        residual = self.head.embed(tokens)
        delta = None  # what the block before adds to the residual
        for index, layer in enumerate(self.layers):
            x = layer.attention_norm(residual) if delta is None else layer.attention_norm(delta, residual)
            delta = layer.attention(x, index, placement, cache)
            delta = layer.mlp(layer.mlp_norm(delta, residual))
        return self.norm(residual) if delta is None else self.norm(delta, residual)

    def logits(self, hidden: Array) -> Float:
        return self.head.logits(hidden)
