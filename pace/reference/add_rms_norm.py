"""A residual connection and the root-mean-square normalisation after it, in one pass."""

from .arrays import Array, check_norm, f32
from .rms_norm import rms_norm


def add_rms_norm(x: Array, residual: Array, weight: Array, eps: float = 1e-5, out: Array | None = None) -> Array:
    """residual += x, then y = rms_norm(residual, weight, eps).

    x: (tokens, hidden) float32 or bfloat16. residual: the same, updated in place. weight: (hidden,) float32. Returns
    (tokens, hidden) of x's dtype, in `out` where it is given; `out` may be x itself, not residual.

    The sum is taken in float32 and rounded to residual's dtype; the norm is that of the rounded sum, so it is
    bit-identical to adding first and norming afterwards.

    TypeError for another dtype; ValueError for another shape, rows that are not contiguous, or a residual that is
    read-only or shares memory with `out`. Nothing is written then.
    """
    check_norm(x, weight, residual=residual, out=out)
    residual[...] = f32(x) + f32(residual)
    return rms_norm(residual, weight, eps, out)
