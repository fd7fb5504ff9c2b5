"""OPT (Zhang et al., 2022) and Galactica: learned positions, norms before the blocks or after them, a plain MLP."""

from dataclasses import dataclass

import numpy as np

from pace.cache import KVCache, Placement
from pace.cache.base import Ints
from pace.ops import LayerNorm
from pace.reference.arrays import Array

from .config import Config
from .layers import Decoder, FeedForward, Norm, Parts, PreNorm, SelfAttention
from .weights import Weights

EPS = 1e-5
FIRST_POSITION = 2  # the row of position 0: those before it are left over from padding


@dataclass(frozen=True)
class PostNorm:
    """A norm after each of the two blocks, as Vaswani et al. (2017) had them."""

    attention: SelfAttention
    attention_norm: Norm
    mlp: FeedForward
    mlp_norm: Norm

    def __call__(
        self, residual: Array, delta: Array | None, index: int, placement: Placement, cache: KVCache
    ) -> tuple[Array, Array | None]:
        if delta is not None:  # positions, where embeddings aren't projected: in no checkpoint that is known
            residual = residual + delta
        x = self.attention_norm(self.attention(residual, index, placement, cache), residual)
        return self.mlp_norm(self.mlp(x), x), None


class Opt(Decoder):
    def __init__(self, config: Config, weights: Weights) -> None:
        config = self.usual(config)
        parts = Parts(config, weights)
        hidden, inner, bias = parts.hidden, config.integer("ffn_dim"), config.flag("enable_bias", True)
        activation, before = config.activation("activation_function", "relu"), config.flag("do_layer_norm_before", True)
        affine = config.flag("layer_norm_elementwise_affine", True)
        normed = before and not config.flag("_remove_final_layer_norm", False)
        root = "model.decoder" if "model.decoder.embed_positions.weight" in weights.checkpoint.names() else "decoder"

        def norm(name: str) -> LayerNorm:
            if affine:
                return weights.layer_norm(name, hidden, EPS)
            return LayerNorm(weights.operators, weights.dtype, np.ones(hidden, np.float32), None, EPS)

        def layer(name: str) -> PreNorm | PostNorm:
            attention = parts.attention(f"{name}.self_attn", None, bias, bias, out="out_proj")
            mlp = weights.plain_mlp(f"{name}.fc1", f"{name}.fc2", hidden, inner, activation, bias)
            attention_norm, mlp_norm = norm(f"{name}.self_attn_layer_norm"), norm(f"{name}.final_layer_norm")
            if before:
                return PreNorm(attention_norm, attention, mlp_norm, mlp)
            return PostNorm(attention, attention_norm, mlp, mlp_norm)

        layers = [layer(name) for name in parts.layers(f"{root}.layers")]
        last = norm(f"{root}.final_layer_norm") if normed else None
        width = config.integer("word_embed_proj_dim", hidden)
        self.positions = weights.embedding(f"{root}.embed_positions", parts.max_positions + FIRST_POSITION, hidden)
        self.project_in = self.project_out = None
        if width != hidden:
            self.project_in = weights.linear("linear", [f"{root}.project_in"], [hidden], width)
            self.project_out = weights.linear("linear", [f"{root}.project_out"], [width], hidden)
        weights.ignore(f"{root}.version")  # of fairseq, in old checkpoints
        super().__init__(parts, layers, last, f"{root}.embed_tokens")
        self.step_bytes -= self.positions.table.nbytes

    @classmethod
    def usual(cls, config: Config) -> Config:
        return Config({"tie_word_embeddings": True, **config.text.values})

    def forward(
        self, tokens: Ints, placement: Placement, cache: KVCache, seen: tuple[Ints, Array] | None = None
    ) -> Array:
        hidden = super().forward(tokens, placement, cache, seen)
        return hidden if self.project_out is None else self.project_out(hidden)

    def embed(self, tokens: Ints, placement: Placement) -> Array:
        embedded = self.head.embed(tokens)
        return embedded if self.project_in is None else self.project_in(embedded, residual=self._positions(placement))

    def embed_positions(self, placement: Placement) -> Array | None:
        return self._positions(placement) if self.project_in is None else None

    def _positions(self, placement: Placement) -> Array:
        return self.positions(placement.positions + np.int32(FIRST_POSITION))
