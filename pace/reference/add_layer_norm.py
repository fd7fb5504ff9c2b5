"""A residual connection and the layer normalisation after it, in one pass."""

from .arrays import Array, check_norm, f32
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
    check_norm(x, weight, bias, residual, out)
    residual[...] = f32(x) + f32(residual)
    return layer_norm(residual, weight, bias, eps, out)
