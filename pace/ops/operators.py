"""The operators that models and the sampler are made of. Each holds its weights and the functions of its backend,
settled when it is built, and does nothing but call them; the functions' contracts are in pace.reference.
"""

import numpy as np

from pace.reference.arrays import Array, Float, float32
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
    """A linear layer; `operator` is what it is to the model: qkv_projection, out_projection, mlp or lm_head."""

    def __init__(
        self, operator: str, config: OperatorConfig, dtype: Dtype, weight: PackedLinear, bias: Float | None = None
    ) -> None:
        self._functions = config.resolve(operator, dtype)
        self.weight, self.bias = weight, bias

    def __call__(self, x: Array, activation: str | None = None, multiply: Array | None = None) -> Array:
        return self._functions.linear(x, self.weight, self.bias, activation, multiply)  # type: ignore[no-any-return]


class GatedMLP:
    """activation(gate) · up, and the projection down."""

    def __init__(
        self,
        config: OperatorConfig,
        dtype: Dtype,
        gate_up: PackedLinear,
        down: PackedLinear,
        activation: str,
        gate_up_bias: Float | None = None,
        down_bias: Float | None = None,
    ) -> None:
        self._functions = config.resolve("mlp", dtype)
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias

    def __call__(self, x: Array) -> Array:
        inner = self._functions.gated_mlp(x, self.gate_up, self.gate_up_bias, self.activation)
        return self._functions.linear(inner, self.down, self.down_bias)  # type: ignore[no-any-return]


class LMHead:
    """The table of tokens, at both ends: embeddings in, logits out."""

    def __init__(self, config: OperatorConfig, dtype: Dtype, embedding: PackedLinear, head: PackedLinear) -> None:
        self._functions = config.resolve("lm_head", dtype)
        self.embedding, self.head = embedding, head

    def embed(self, tokens: Array) -> Array:
        """(tokens, hidden), of tokens (tokens,) int32."""
        return self._functions.embed(tokens, self.embedding)  # type: ignore[no-any-return]

    def logits(self, hidden: Array) -> Float:
        """(rows, vocabulary) float32, of hidden (rows, hidden)."""
        return self._functions.linear(hidden, self.head, out_dtype=np.float32)  # type: ignore[no-any-return]


class RoPE:
    """Rotary position embedding; frequencies (rotary_dim / 2,) float32 are radians a position.

    Tables of cosines and sines grow with the positions that come, up to max_positions: a model may allow a million.
    """

    FIRST_POSITIONS = 4096

    def __init__(
        self, config: OperatorConfig, dtype: Dtype, frequencies: Float, max_positions: int, interleaved: bool = False
    ) -> None:
        self._functions = config.resolve("rope", dtype)
        self.frequencies, self.max_positions, self.interleaved = frequencies, max_positions, interleaved
        self._tables = self._computed(min(self.FIRST_POSITIONS, max_positions))
        self._covered: Array | None = None

    def __call__(self, q: Array, k: Array, positions: Array) -> None:
        if positions is not self._covered:  # every layer comes with the same array
            self._cover(int(positions.max(initial=0)) + 1)
            self._covered = positions
        self._functions.rope(q, k, *self._tables, positions, self.interleaved)

    def _cover(self, num_positions: int) -> None:
        size = len(self._tables[0])
        while size < min(num_positions, self.max_positions):
            size *= 2
        if size > len(self._tables[0]):
            self._tables = self._computed(min(size, self.max_positions))

    def _computed(self, num_positions: int) -> tuple[Float, Float]:
        """In float32 throughout, as transformers'."""
        angles: Float = np.arange(num_positions, dtype=np.float32)[:, None] * self.frequencies
        return np.cos(angles), np.sin(angles, out=angles)


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
