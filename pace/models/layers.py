"""What models are built of: a page each says which parts they have, and in what they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pace.cache import CacheShape, KVCache, Placement
from pace.cache.base import Ints
from pace.ops import MLP, Linear, RMSNorm, RoPE
from pace.reference.arrays import Array, Float

from .base import Model
from .config import Config
from .rope import Rotary, longest_text
from .weights import Weights


class Norm(Protocol):
    """Of x; or of x + residual, which residual then holds."""

    def __call__(self, x: Array, residual: Array | None = None) -> Array: ...


class FeedForward(Protocol):
    def __call__(self, x: Array) -> Array: ...


class Layer(Protocol):
    """One step of the residual stream. `delta` is what the layer before adds to it, and has not yet: the next norm
    does both in one pass. Returns the same two.
    """

    @property
    def attention(self) -> "SelfAttention": ...

    def __call__(
        self, residual: Array, delta: Array | None, index: int, placement: Placement, cache: KVCache
    ) -> tuple[Array, Array | None]: ...


class SelfAttention:
    """Fused QKV projection, norms of heads, rotary positions, the cache, the output projection."""

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        rope: RoPE | None,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        *,
        head_norms: tuple[RMSNorm, RMSNorm] | None = None,
        window: int | None = None,
        sinks: Float | None = None,
        softcap: float | None = None,
    ) -> None:
        """head_norms: of every query and of every key. scale, window, sinks and softcap: as pace.reference.attend."""
        self.qkv, self.out, self.rope, self.head_norms = qkv, out, rope, head_norms
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.window, self.sinks, self.softcap = scale, window, sinks, softcap

    def __call__(
        self, x: Array, layer: int, placement: Placement, cache: KVCache, residual: Array | None = None
    ) -> Array:
        """With residual, (tokens, hidden), added."""
        tokens = len(x)
        qkv = self.qkv(x).reshape(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = np.split(qkv, (self.heads, self.heads + self.kv_heads), axis=1)
        if self.head_norms is not None:
            q_norm, k_norm = self.head_norms
            q, k = self._normed(q_norm, q), self._normed(k_norm, k)
        if self.rope is not None:
            self.rope(q, k, placement.positions, placement.text_lengths)
        attended = cache.attend(layer, q, k, v, placement, self.scale, self.window, self.sinks, self.softcap)
        return self.out(attended.reshape(tokens, -1), residual=residual)

    def _normed(self, norm: RMSNorm, x: Array) -> Array:
        return norm(x.reshape(-1, self.head_dim)).reshape(x.shape)


@dataclass(frozen=True)
class PreNorm:
    """A norm before each of the two blocks (Xiong et al., 2020)."""

    attention_norm: Norm
    attention: SelfAttention
    mlp_norm: Norm
    mlp: FeedForward

    def __call__(
        self, residual: Array, delta: Array | None, index: int, placement: Placement, cache: KVCache
    ) -> tuple[Array, Array | None]:
        x = norm_of_sum(self.attention_norm, residual, delta)
        delta = self.attention(x, index, placement, cache)
        return residual, self.mlp(self.mlp_norm(delta, residual))


def norm_of_sum(norm: Norm, residual: Array, delta: Array | None) -> Array:
    """Of the residual stream once delta is added, which it then is."""
    return norm(residual) if delta is None else norm(delta, residual)


class Parts:
    """The parts of one model, by the names of their tensors; sizes are read from the usual keys of config.json."""

    def __init__(self, config: Config, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.hidden, self.num_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
        self.heads, self.kv_heads, self.head_dim = config.heads(self.hidden)
        self.vocabulary, self.max_positions = config.integer("vocab_size"), longest_text(config)

    def layers(self, name: str) -> list[str]:
        return [f"{name}.{index}" for index in range(self.num_layers)]

    def rope(self, settings: dict[str, Any] | None = None, interleaved: bool = False) -> RoPE:
        """settings: those of one type of layers, where each type has its own."""
        frequencies = Rotary.of(self.config, self.head_dim, settings).frequencies()
        return RoPE(self.weights.operators, self.weights.dtype, frequencies, self.max_positions, interleaved)

    def rms_norm(self, name: str, size: int | None = None, offset: float = 0.0) -> RMSNorm:
        """offset: what is added to the weight."""
        return self.weights.rms_norm(name, size or self.hidden, self.config.number("rms_norm_eps", 1e-6), offset)

    def attention(
        self,
        name: str,
        rope: RoPE | None,
        bias: bool = False,
        out_bias: bool = False,
        *,
        qkv: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
        out: str = "o_proj",
        head_norms: bool = False,
        norm_offset: float = 0.0,
        scale: float | None = None,
        **seen: Any,
    ) -> SelfAttention:
        """qkv: the three tensors, or the one that has them all. seen: window, sinks, softcap of SelfAttention."""
        rows = [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]
        rows = rows if len(qkv) == 3 else [sum(rows)]
        norms = None
        if head_norms:
            q_norm, k_norm = (self.rms_norm(f"{name}.{which}_norm", self.head_dim, norm_offset) for which in "qk")
            norms = q_norm, k_norm
        return SelfAttention(
            self.weights.linear("qkv_projection", [f"{name}.{which}" for which in qkv], rows, self.hidden, bias),
            self.weights.linear(
                "out_projection", [f"{name}.{out}"], [self.hidden], self.heads * self.head_dim, out_bias
            ),
            rope,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.head_dim**-0.5 if scale is None else scale,
            head_norms=norms,
            **seen,
        )

    def gated_mlp(
        self,
        name: str,
        bias: bool = False,
        activation: str = "hidden_act",
        gate_up: Sequence[str] = ("gate_proj", "up_proj"),
    ) -> MLP:
        """activation: its key in config.json. gate_up: the two tensors, or the one that has both."""
        return self.weights.gated_mlp(
            [f"{name}.{which}" for which in gate_up],
            f"{name}.down_proj",
            self.hidden,
            self.config.integer("intermediate_size"),
            self.config.activation(activation, "silu"),
            bias,
        )


class Decoder(Model):
    """Embeddings, layers over a residual stream in the model's dtype, a last norm, and the head."""

    layers: Sequence[Layer]

    def __init__(
        self,
        parts: Parts,
        layers: Sequence[Layer],
        norm: Norm | None,
        embedding: str = "model.embed_tokens",
        head: str = "lm_head",
        head_bias: bool = False,
        embedding_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        """embedding_scale and softcap: of pace.ops.LMHead."""
        weights = parts.weights
        self.dtype, self.layers, self.norm = weights.dtype, layers, norm
        self.vocabulary, self.max_positions = parts.vocabulary, parts.max_positions
        tied = parts.config.flag("tie_word_embeddings", False)
        width = parts.config.integer("word_embed_proj_dim", parts.hidden)
        self.head = weights.lm_head(embedding, head, self.vocabulary, width, tied, head_bias, embedding_scale, softcap)
        windows = tuple(layer.attention.window for layer in layers)
        self.cache_shape = CacheShape(
            parts.num_layers, parts.kv_heads, parts.head_dim, self.dtype, self.max_positions, windows
        )
        self.weight_bytes = weights.nbytes
        self.step_bytes = weights.nbytes - (0 if tied else self.head.embedding.nbytes)
        self.expert_bytes, self.chosen_share = weights.expert_bytes, weights.chosen_share

        rotary = [layer.attention.rope.frequencies for layer in layers if layer.attention.rope is not None]
        stretched = [frequencies for frequencies in rotary if frequencies.trained is not None]
        self.stretched_beyond = min((each.trained for each in stretched if each.trained), default=None)
        self.stretched_whole = any(each.uniform for each in stretched)

    def forward(
        self, tokens: Ints, placement: Placement, cache: KVCache, seen: tuple[Ints, Array] | None = None
    ) -> Array:
        residual, delta = self.embed(tokens, placement), self.embed_positions(placement)
        if seen is not None:
            rows, values = seen
            residual[rows] = values
        for index, layer in enumerate(self.layers):
            residual, delta = layer(residual, delta, index, placement, cache)
        if self.norm is not None:
            return norm_of_sum(self.norm, residual, delta)
        return residual if delta is None else residual + delta

    def embed(self, tokens: Ints, placement: Placement) -> Array:
        """What comes into the first layer, (tokens, hidden)."""
        return self.head.embed(tokens)

    def embed_positions(self, placement: Placement) -> Array | None:
        """What the first norm adds to that, (tokens, hidden), where positions are learned."""
        return None

    def logits(self, hidden: Array) -> Float:
        return self.head.logits(hidden)
