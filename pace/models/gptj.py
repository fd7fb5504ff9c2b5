"""GPT-J (Wang and Komatsuzaki, 2021): attention and MLP side by side after one norm, interleaved rotary pairs."""

from dataclasses import dataclass

from pace.cache import KVCache, Placement
from pace.ops import MLP
from pace.reference.arrays import Array

from .config import Config
from .layers import Decoder, Norm, Parts, SelfAttention, norm_of_sum
from .weights import Weights

NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}


@dataclass(frozen=True)
class Parallel:
    """x + attention(norm(x)) + mlp(norm(x)): one norm for both."""

    norm: Norm
    attention: SelfAttention
    mlp: MLP

    def __call__(
        self, residual: Array, delta: Array | None, index: int, placement: Placement, cache: KVCache
    ) -> tuple[Array, Array | None]:
        x = norm_of_sum(self.norm, residual, delta)
        return residual, self.mlp(x, residual=self.attention(x, index, placement, cache))


class Gptj(Decoder):
    def __init__(self, config: Config, weights: Weights) -> None:
        config = self.usual(config)
        parts = Parts(config, weights)
        rope, eps = parts.rope(interleaved=True), config.number("layer_norm_epsilon", 1e-5)
        inner = config.integer("n_inner", 4 * parts.hidden)
        activation = config.activation("activation_function", "gelu_new")
        layers = [
            Parallel(
                weights.layer_norm(f"{name}.ln_1", parts.hidden, eps),
                parts.attention(f"{name}.attn", rope, out="out_proj"),
                weights.plain_mlp(f"{name}.mlp.fc_in", f"{name}.mlp.fc_out", parts.hidden, inner, activation, True),
            )
            for name in parts.layers("transformer.h")
        ]
        norm = weights.layer_norm("transformer.ln_f", parts.hidden, eps)
        super().__init__(parts, layers, norm, "transformer.wte", head_bias=True)

    @classmethod
    def usual(cls, config: Config) -> Config:
        return Config({"rotary_dim": 64, **config.text.renamed(NAMES).values})
