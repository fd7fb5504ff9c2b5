"""Root-mean-square layer normalisation (Zhang and Sennrich, 2019)."""

import numpy as np

from .arrays import Array, check_norm, f32


def rms_norm(x: Array, weight: Array, eps: float = 1e-5, out: Array | None = None) -> Array:
    """y = x / sqrt(mean(x²) + eps) · weight, row by row.

    x: (tokens, hidden) float32 or bfloat16. weight: (hidden,) float32. Returns (tokens, hidden) of x's dtype, in `out`
    where it is given; `out` may be x itself.

    All in float32, rounded once, to x's dtype, at the end.

    TypeError for another dtype; ValueError for another shape, or rows that are not contiguous.
    """
    check_norm(x, weight, out=out)
    result = np.empty(x.shape, x.dtype) if out is None else out
    values = f32(x)
    inverse_rms = 1 / np.sqrt(np.mean(values * values, axis=1, keepdims=True) + np.float32(eps))
    result[...] = values * inverse_rms * f32(weight)
    return result
