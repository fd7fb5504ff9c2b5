"""The operators that models and the sampler are made of. Each holds its weights and the functions of its backend,
settled when it is built, and does nothing but call them; the functions' contracts are in pace.reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pace.reference.arrays import Array, Float, float32
from pace.reference.pack_experts import PackedExperts
from pace.reference.pack_linear import PackedLinear
from pace.reference.sample import Bias, History, Sampled

from .config import OperatorConfig
from .registry import Dtype


class RMSNorm:
    """weight is (hidden,) float32."""

    def __init__(self, config: OperatorConfig, dtype: Dtype, weight: Float, eps: float) -> None:
        self._functions = config.resolve("norm", dtype)
        self.weight, self.eps = weight, eps

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """The norm of x; or of x + residual, which residual then holds."""
        if residual is None:
            return self._functions.rms_norm(x, self.weight, self.eps)  # type: ignore[no-any-return]
        return self._functions.add_rms_norm(x, residual, self.weight, self.eps)  # type: ignore[no-any-return]


class LayerNorm:
    """weight and bias are (hidden,) float32."""

    def __init__(self, config: OperatorConfig, dtype: Dtype, weight: Float, bias: Float | None, eps: float) -> None:
        self._functions = config.resolve("norm", dtype)
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """The norm of x; or of x + residual, which residual then holds."""
        if residual is None:
            return self._functions.layer_norm(x, self.weight, self.bias, self.eps)  # type: ignore[no-any-return]
        return self._functions.add_layer_norm(x, residual, self.weight, self.bias, self.eps)  # type: ignore[no-any-return]


class Linear:
    """A linear layer; `operator` is what it is to the model: qkv_projection, out_projection or just linear. weight: as
    its backend has prepared it.
    """

    def __init__(
        self, operator: str, config: OperatorConfig, dtype: Dtype, weight: Any, bias: Float | None = None
    ) -> None:
        self._functions = config.resolve(operator, dtype)
        self.weight, self.bias = weight, bias

    def __call__(
        self, x: Array, activation: str | None = None, multiply: Array | None = None, residual: Array | None = None
    ) -> Array:
        """activation(x · weightᵀ + bias) · multiply + residual."""
        return self._functions.linear(  # type: ignore[no-any-return]
            x, self.weight, self.bias, activation, multiply, residual
        )


class MLP:
    """activation(gate) · up, or activation(up), and the projection down. weights: as the backend has prepared them."""

    def __init__(
        self,
        config: OperatorConfig,
        dtype: Dtype,
        weights: Any,
        activation: str,
        up_bias: Float | None = None,
        down_bias: Float | None = None,
    ) -> None:
        self._functions = config.resolve("mlp", dtype)
        self.weights, self.activation, self.up_bias, self.down_bias = weights, activation, up_bias, down_bias

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """With residual, (tokens, hidden), added."""
        return self._functions.mlp(  # type: ignore[no-any-return]
            x, self.weights, self.up_bias, self.down_bias, self.activation, residual
        )


class Activation:
    """relu, gelu_erf, gelu_tanh or silu by itself: where it follows a product, it is the product's."""

    def __init__(self, config: OperatorConfig, dtype: Dtype, activation: str) -> None:
        self._functions = config.resolve("activation", dtype)
        self.activation = activation

    def __call__(self, x: Array, multiply: Array | None = None) -> Array:
        """activation(x) · multiply."""
        return self._functions.activate(x, self.activation, multiply)  # type: ignore[no-any-return]


class Softmax:
    """Of rows, by itself: attention has its own."""

    def __init__(self, config: OperatorConfig, dtype: Dtype) -> None:
        self._functions = config.resolve("softmax", dtype)

    def __call__(self, x: Array, scale: float = 1.0) -> Array:
        """softmax(scale · x)."""
        return self._functions.softmax(x, scale)  # type: ignore[no-any-return]


class Embedding:
    """Rows of a table, (rows, hidden)."""

    def __init__(self, config: OperatorConfig, dtype: Dtype, table: PackedLinear) -> None:
        self._functions = config.resolve("embedding", dtype)
        self.table = table

    def __call__(self, rows: Array) -> Array:
        """(rows, hidden), of their indices (rows,) int32."""
        return self._functions.embed(rows, self.table)  # type: ignore[no-any-return]


class MoE:
    """A router, and the experts of which each token has `chosen` (reference.route, reference.moe)."""

    def __init__(
        self,
        config: OperatorConfig,
        dtype: Dtype,
        router: PackedLinear,
        router_bias: Float | None,
        gate_up: PackedExperts,
        down: PackedExperts,
        gate_up_bias: Float | None,
        down_bias: Float | None,
        chosen: int,
        alpha: float,
        limit: float,
    ) -> None:
        self._functions = config.resolve("moe", dtype)
        self.router, self.router_bias = router, router_bias
        self.gate_up, self.down = gate_up, down
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias
        self.chosen, self.alpha, self.limit = chosen, alpha, limit

    def __call__(self, x: Array) -> Array:
        logits = self._functions.linear(x, self.router, self.router_bias, out_dtype=np.float32)
        experts, weights = self._functions.route(logits, self.chosen)
        biases = self.gate_up_bias, self.down_bias
        return self._functions.moe(  # type: ignore[no-any-return]
            x, self.gate_up, self.down, experts, weights, *biases, self.alpha, self.limit
        )


class LMHead:
    """The table of tokens, at both ends: embeddings in, logits out. bias: (vocabulary,) float32, or None.

    scale: of embeddings; rounded to dtype, as the models that have one were trained. softcap: logits x become
    softcap · tanh(x / softcap).
    """

    def __init__(
        self,
        config: OperatorConfig,
        dtype: Dtype,
        embedding: PackedLinear,
        head: Any,
        bias: Float | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        """head: as its backend has prepared it, or `embedding`, where there is one table for both."""
        self._embedding = config.resolve("embedding", dtype)
        self._functions = config.resolve("lm_head", dtype, in_panels=head is embedding)
        self.embedding, self.head, self.bias = embedding, head, bias
        self.scale, self.softcap = float(dtype.type(scale)), softcap

    def embed(self, tokens: Array) -> Array:
        """(tokens, hidden), of tokens (tokens,) int32."""
        return self._embedding.embed(tokens, self.embedding, self.scale)  # type: ignore[no-any-return]

    def logits(self, hidden: Array) -> Float:
        """(rows, vocabulary) float32, of hidden (rows, hidden)."""
        logits: Float = self._functions.linear(hidden, self.head, self.bias, out_dtype=np.float32)
        if self.softcap is not None:
            logits /= np.float32(self.softcap)
            np.tanh(logits, out=logits)
            logits *= np.float32(self.softcap)
        return logits


@dataclass(frozen=True)
class Frequencies:
    """How far each pair of a head is rotated: radians a position, (rotary_dim / 2,) float32.

    Texts of more than `trained` tokens have those that `stretched` gives for their length, where there are such; with
    `uniform`, the same for every length. `scale` multiplies cosines and sines.
    """

    usual: Float
    scale: float = 1.0
    trained: int | None = None
    stretched: Callable[[int], Float] | None = None
    uniform: bool = False


class RoPE:
    """Rotary position embedding.

    Tables of cosines and sines grow with the positions that come, up to max_positions: a model may allow a million.
    """

    FIRST_POSITIONS = 4096

    def __init__(
        self,
        config: OperatorConfig,
        dtype: Dtype,
        frequencies: Frequencies,
        max_positions: int,
        interleaved: bool = False,
    ) -> None:
        self._functions = config.resolve("rope", dtype)
        self.frequencies, self.max_positions, self.interleaved = frequencies, max_positions, interleaved
        self._tables = self._computed(np.arange(min(self.FIRST_POSITIONS, max_positions)), frequencies.usual)
        self._now: tuple[Array, Array, tuple[Float, Float]] | None = None  # positions, the rows that they have, in what

    def __call__(self, q: Array, k: Array, positions: Array, lengths: Array | None = None) -> None:
        """Rotate q and k in place, (tokens, heads, head_dim). positions: (tokens,) int32. lengths: (tokens,) int32,
        those of the texts that tokens belong to, which `Frequencies` may ask for; None where none is over `trained`.
        """
        if self._now is None or self._now[0] is not positions:  # every layer comes with the same array
            self._now = (positions, *self._rows(positions, lengths))
        _, rows, tables = self._now
        self._functions.rope(q, k, *tables, rows, self.interleaved)

    def _rows(self, positions: Array, lengths: Array | None) -> tuple[Array, tuple[Float, Float]]:
        trained = self.frequencies.trained
        if lengths is None or trained is None or lengths.max(initial=0) <= trained:
            self._cover(int(positions.max(initial=0)) + 1)
            return positions, self._tables
        distinct, which = np.unique(lengths, return_inverse=True)
        frequencies = np.stack([self._of_length(length) for length in distinct.tolist()])[which]
        return np.arange(len(positions), dtype=np.int32), self._computed(positions, frequencies)

    def _of_length(self, length: int) -> Float:
        frequencies = self.frequencies
        if frequencies.stretched is None or frequencies.trained is None or length <= frequencies.trained:
            return frequencies.usual
        return frequencies.stretched(length)

    def _cover(self, num_positions: int) -> None:
        size = len(self._tables[0])
        while size < min(num_positions, self.max_positions):
            size *= 2
        if size > len(self._tables[0]):
            self._tables = self._computed(np.arange(min(size, self.max_positions)), self.frequencies.usual)

    def _computed(self, positions: Array, frequencies: Float) -> tuple[Float, Float]:
        """Cosines and sines in float32 throughout, as transformers'."""
        angles: Float = positions.astype(np.float32)[:, None] * frequencies
        scale = np.float32(self.frequencies.scale)
        return np.cos(angles) * scale, np.sin(angles, out=angles) * scale


class Attention:
    """What a cache attends with: writing keys and values, and reading them."""

    def __init__(self, config: OperatorConfig, dtype: Dtype) -> None:
        functions = config.resolve("attention", dtype)
        self.store, self.attend = functions.store_kv, functions.attend


class Sampling:
    """Tokens from logits, (rows, vocabulary) float32 in every dtype of the model."""

    def __init__(self, config: OperatorConfig) -> None:
        self._functions = config.resolve("sampling", float32)

    def __call__(
        self,
        logits: Float,
        params: Array,
        draws: Array | None,
        history: History | None,
        bias: Bias | None,
        top_logprobs: int | None,
        allowed: Array | None = None,
        given: Array | None = None,
    ) -> Sampled:
        """One token a row, by `params` (rows,) SAMPLING_DTYPE, of those that `allowed` masks; or the one `given`."""
        return self._functions.sample(  # type: ignore[no-any-return]
            logits, params, draws, history, bias, top_logprobs, allowed, given
        )
