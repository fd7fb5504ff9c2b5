"""SigLIP's vision tower (Zhai et al., 2023), a transformer over the patches of an image, which see each other all."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pace.cache import CACHES, CacheShape
from pace.errors import ModelError
from pace.reference.arrays import Array, Float
from pace.reference.store_kv import GROUP

from .config import Config
from .layers import PreNorm, SelfAttention, norm_of_sum
from .weights import Weights

# What config.json means where it says nothing.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


class Siglip:
    """Images of `image_size` to a side, in patches of `patch_size`, `side` to a side."""

    def __init__(self, config: Config, weights: Weights, name: str) -> None:
        """config: as `usual` gives it. name: what those of the tensors begin with, a dot included."""
        self.dtype, self._operators = weights.dtype, weights.operators
        self.hidden, self.channels = config.integer("hidden_size"), config.integer("num_channels")
        self.heads, _, self.head_dim = config.heads(self.hidden)
        if self.heads * self.head_dim != self.hidden:
            raise ModelError(f"hidden_size of the vision tower is {self.hidden}; it must be a multiple of {self.heads}")
        self.image_size, self.patch_size = config.integer("image_size"), config.integer("patch_size")
        self.side = self.image_size // self.patch_size

        self._embed = weights.reshaped_linear(
            "linear",
            f"{name}embeddings.patch_embedding.weight",
            (self.hidden, self.channels, self.patch_size, self.patch_size),
            lambda weight: weight.reshape(self.hidden, -1),
            f"{name}embeddings.patch_embedding.bias",
        )
        positions = weights.array(f"{name}embeddings.position_embedding.weight", (self.side**2, self.hidden))
        self._positions = positions.astype(self.dtype)
        eps = config.number("layer_norm_eps")
        self._layers = [
            self._layer(config, weights, f"{name}encoder.layers.{index}", eps)
            for index in range(config.integer("num_hidden_layers"))
        ]
        self._norm = weights.layer_norm(f"{name}post_layernorm", self.hidden, eps)
        for tensor in weights.checkpoint.names():
            if tensor.startswith(f"{name}head."):  # it makes one vector of an image, for search
                weights.ignore(tensor)

    def __call__(self, image: Float) -> Array:
        """What an image (channels, image_size, image_size) becomes: (patches, hidden), row by row."""
        # The keys and values of one layer, which the next overwrites.
        tokens = len(self._positions)
        room = -(-tokens // GROUP) * GROUP
        shape = CacheShape(1, self.heads, self.head_dim, self.dtype, room)
        cache = CACHES["PAGED"](shape, room * shape.bytes_per_token, self._operators, room)
        placement = cache.append([cache.allocate()], [tokens])
        placement = replace(placement, spans=np.tile(np.array([0, tokens], np.int32), (tokens, 1)))

        residual = self._embed(self._patches(image).astype(self.dtype), residual=self._positions)
        delta: Array | None = None
        for layer in self._layers:
            residual, delta = layer(residual, delta, 0, placement, cache)
        return norm_of_sum(self._norm, residual, delta)

    def _patches(self, image: Float) -> Float:
        """(patches, channels · patch_size²), each as the weight of the convolution has it that they stand for."""
        used = self.side * self.patch_size
        grid = image[:, :used, :used].reshape(self.channels, self.side, self.patch_size, self.side, self.patch_size)
        return grid.transpose(1, 3, 0, 2, 4).reshape(self.side**2, -1)

    def _layer(self, config: Config, weights: Weights, name: str, eps: float) -> PreNorm:
        hidden, inner = self.hidden, config.integer("intermediate_size")
        qkv = [f"{name}.self_attn.{which}_proj" for which in "qkv"]
        attention = SelfAttention(
            weights.linear("qkv_projection", qkv, [hidden] * 3, hidden, bias=True),
            weights.linear("out_projection", [f"{name}.self_attn.out_proj"], [hidden], hidden, bias=True),
            None,
            self.heads,
            self.heads,
            self.head_dim,
            self.head_dim**-0.5,
        )
        return PreNorm(
            weights.layer_norm(f"{name}.layer_norm1", hidden, eps),
            attention,
            weights.layer_norm(f"{name}.layer_norm2", hidden, eps),
            weights.plain_mlp(
                f"{name}.mlp.fc1", f"{name}.mlp.fc2", hidden, inner, config.activation("hidden_act", "gelu"), bias=True
            ),
        )


def usual(config: Config) -> Config:
    """With what is left out."""
    return Config({**DEFAULTS, **{key: value for key, value in config.values.items() if value is not None}})
