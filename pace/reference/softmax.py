"""The softmax of rows."""

import numpy as np

from .arrays import Array, check_float, check_output_rows, check_rows, f32


def softmax(x: Array, scale: float = 1.0, out: Array | None = None) -> Array:
    """y = e^(scale · x - m) / Σ e^(scale · x - m), m the largest scale · x, row by row.

    x: (rows, columns) float32 or bfloat16. Returns (rows, columns) of x's dtype, in `out` where it is given; `out` may
    be x itself. A row that has NaN or +infinity, or nothing but -infinity, is NaN.

    In float32, rounded once, to x's dtype, at the end.

    TypeError for another dtype; ValueError for another shape, or rows that are not contiguous.
    """
    check_softmax(x, out)
    result = np.empty(x.shape, x.dtype) if out is None else out
    scaled = f32(x) * np.float32(scale)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True, initial=-np.inf))
        result[...] = powers / powers.sum(axis=1, keepdims=True)
    return result


def check_softmax(x: Array, out: Array | None) -> None:
    check_float(x, "x")
    check_rows(x, "x")
    if out is not None:
        check_output_rows(out, "out", len(x), x.shape[1], x.dtype)
