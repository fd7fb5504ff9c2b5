"""The gated half of a transformer's MLP (Shazeer, 2020): SwiGLU and its kin."""

import numpy as np

from .activate import activated
from .arrays import Array, check_vector, f32, output_rows
from .linear import check_product
from .pack_linear import PackedLinear, unpack_linear


def gated_mlp(
    x: Array, weight: PackedLinear, bias: Array | None = None, activation: str = "silu", out: Array | None = None
) -> Array:
    """y = activation(x · gateᵀ + gate_bias) · (x · upᵀ + up_bias).

    x: (tokens, in_features) of weight's dtype. weight: gated, gate's and up's panels alternating (pack_linear with
    panel_step 2, first_panel 0 for gate and 1 for up). bias: (2 · out_features,) float32, gate's then up's. activation:
    one of linear's ACTIVATIONS. Returns (tokens, out_features) of x's dtype, in `out` where it is given.

    Products and sums in float32, in ascending order of k; rounded once, to x's dtype, at the end.

    Errors as linear's.
    """
    check_product(x, weight, gated=True)
    gate, up = (f32(x) @ half.T for half in unpack_linear(weight))
    if bias is not None:
        check_vector(bias, "bias", 2 * weight.out_features, np.float32)
        gate, up = gate + bias[: weight.out_features], up + bias[weight.out_features :]
    result = output_rows(out, x.shape[0], weight.out_features, x.dtype)
    result[...] = activated(gate, activation) * up
    return result
