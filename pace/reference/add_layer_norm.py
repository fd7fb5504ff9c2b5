"""A residual connection and the layer normalisation after it, in one pass."""

import numpy as np

from .arrays import Array, check_apart, check_float, check_output_rows, check_rows, check_vector, f32, output_rows
from .layer_norm import layer_norm


def add_layer_norm(
    x: Array, residual: Array, weight: Array, bias: Array | None, eps: float = 1e-5, out: Array | None = None
) -> Array:
    """residual += x, then y = layer_norm(residual, weight, bias, eps).

    x: (tokens, hidden) float32 or bfloat16. residual: the same, updated in place. weight: (hidden,) float32. bias: the
    same, or None for none. Returns (tokens, hidden) of x's dtype, in `out` where it is given; `out` may be x itself,
    not residual.

    The sum is taken in float32 and rounded to residual's dtype; the norm is that of the rounded sum, so it is
    bit-identical to adding first and norming afterwards.

    TypeError for another dtype; ValueError for another shape, rows that are not contiguous, or a residual that is
    read-only or shares memory with `out`. Nothing is written then.
    """
    check_float(x, "x")
    check_rows(x, "x")
    rows, hidden = x.shape
    check_output_rows(residual, "residual", rows, hidden, x.dtype)
    check_vector(weight, "weight", hidden, np.float32)
    if bias is not None:
        check_vector(bias, "bias", hidden, np.float32)
    result = output_rows(out, rows, hidden, x.dtype)
    check_apart(result, "out", residual, "residual")
    residual[...] = f32(x) + f32(residual)
    return layer_norm(residual, weight, bias, eps, result)
