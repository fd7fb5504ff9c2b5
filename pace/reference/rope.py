"""Rotary position embedding (Su et al., 2021)."""

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, Float, check_dtype, check_float, check_heads, check_type, check_vector, check_writeable, f32


def rope(q: Array, k: Array, cos: Float, sin: Float, positions: NDArray[np.int32], interleaved: bool = False) -> None:
    """Rotate q and k in place: y1 = x1·cos - x2·sin, y2 = x2·cos + x1·sin, for each pair (x1, x2) of a head.

    q: (tokens, heads, head_dim) float32 or bfloat16; k: (tokens, kv_heads, head_dim) of q's dtype. Tokens may lie any
    distance apart (q and k are views into one QKV matrix), the heads of a token are contiguous. cos, sin:
    (positions, rotary_dim/2) float32, contiguous; pair i of a token is rotated by entry i of its position's row.
    positions: (tokens,) int32.

    Pair i is the elements (i, i + rotary_dim/2), or (2i, 2i + 1) where interleaved. Elements from rotary_dim on are
    left alone.

    In float32: both products and their sum are rounded, none fused; then rounded once, to q's dtype. So both forms
    give the same bits, but that AVX-512 rounds to bfloat16 with denormals flushed to zero.

    TypeError for another dtype; ValueError for another shape or stride, a read-only q or k, or a position that is not
    in the tables. Nothing is written then.
    """
    check_float(q, "q")
    check_heads(q, "q")
    tokens, _, head_dim = q.shape
    check_dtype(k, "k", q.dtype)
    check_heads(k, "k", tokens, head_dim)
    check_writeable(q, "q")
    check_writeable(k, "k")
    _check_table(cos, "cos")
    _check_table(sin, "sin")
    num_positions, half = cos.shape
    if sin.shape != cos.shape:
        raise ValueError(f"sin has shape {sin.shape}; it must be {cos.shape}, as cos")
    if 2 * half > head_dim:
        raise ValueError(f"cos has shape {cos.shape}; it must have at most {head_dim // 2} columns, half of head_dim")
    check_vector(positions, "positions", tokens, np.int32)
    for token in np.flatnonzero((positions < 0) | (positions >= num_positions)):
        raise ValueError(f"positions[{token}] is {positions[token]}; the tables have {num_positions} positions")

    c, s = cos[positions][:, None], sin[positions][:, None]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    for x in (q, k):
        x1, x2 = f32(x[..., first]), f32(x[..., second])
        x[..., first] = x1 * c - x2 * s
        x[..., second] = x2 * c + x1 * s


def _check_table(table: Array, name: str) -> None:
    check_type(table, name, np.float32)
    if table.ndim != 2:
        raise ValueError(f"{name} has shape {table.shape}; it must be (positions, rotary_dim/2)")
    if not table.flags.c_contiguous:
        raise ValueError(f"{name} has strides {table.strides}; it must be contiguous")
