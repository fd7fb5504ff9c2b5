"""Layer normalisation (Ba, Kiros and Hinton, 2016)."""

import numpy as np

from .arrays import Array, check_norm, f32


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float = 1e-5, out: Array | None = None) -> Array:
    """y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · weight + bias, row by row.

    x: (tokens, hidden) float32 or bfloat16. weight: (hidden,) float32. bias: the same, or None for none. Returns
    (tokens, hidden) of x's dtype, in `out` where it is given; `out` may be x itself.

    All in float32, rounded once, to x's dtype, at the end. The variance is the mean of the squared deviations, not
    mean(x²) - mean(x)², which loses everything where the mean is large.

    TypeError for another dtype; ValueError for another shape, or rows that are not contiguous.
    """
    check_norm(x, weight, bias, out=out)
    result = np.empty(x.shape, x.dtype) if out is None else out
    values = f32(x)
    deviations = values - np.mean(values, axis=1, keepdims=True)
    variance = np.mean(deviations * deviations, axis=1, keepdims=True)
    normed = deviations * (1 / np.sqrt(variance + np.float32(eps))) * f32(weight)
    result[...] = normed if bias is None else normed + f32(bias)
    return result
