"""An MLP as two products: what backends whose weights stay in panels have in common."""

from collections.abc import Callable
from typing import Any

from pace.reference.arrays import Array, Float
from pace.reference.pack_linear import PackedLinear

MLPWeights = tuple[PackedLinear, PackedLinear]


def in_panels(*weights: PackedLinear) -> Any:
    """As they are."""
    return weights if len(weights) > 1 else weights[0]


def mlp_of(linear: Callable[..., Array], gated_mlp: Callable[..., Array]) -> Callable[..., Array]:
    """An `mlp` of these two."""

    def mlp(
        x: Array,
        weights: MLPWeights,
        up_bias: Float | None,
        down_bias: Float | None,
        activation: str,
        residual: Array | None = None,
    ) -> Array:
        """activation(gate) · up of a gated weight, else activation(up); and the projection down, residual added."""
        up, down = weights
        inner = gated_mlp(x, up, up_bias, activation) if up.gated else linear(x, up, up_bias, activation)
        return linear(inner, down, down_bias, residual=residual)

    return mlp
