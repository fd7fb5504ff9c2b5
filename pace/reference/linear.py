"""Linear layers with what follows them fused in: bias, activation, multiplication, residual."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from .activate import ACTIVATIONS, activated, check_operand
from .arrays import Array, bfloat16, check_float, check_output_rows, check_rows, check_vector, f32, float32
from .pack_linear import PackedLinear, unpack_linear


def linear(
    x: Array,
    weight: PackedLinear,
    bias: Array | None = None,
    activation: str | None = None,
    multiply: Array | None = None,
    residual: Array | None = None,
    out_dtype: DTypeLike | None = None,
    out: Array | None = None,
) -> Array:
    """y = activation(x · weightᵀ + bias) · multiply + residual.

    x: (tokens, in_features) of weight's dtype. bias: (out_features,) float32. activation: None or one of ACTIVATIONS.
    multiply, residual: (tokens, out_features) of the result's dtype. Returns (tokens, out_features) of `out_dtype`
    (float32 or bfloat16; None: x's dtype), in `out` where it is given; `out` may be `residual` itself.

    Products and sums in float32, in ascending order of k; rounded once, to the result's dtype, at the end. The native
    avx512 rung takes denormal bfloat16 as zero.

    TypeError for another dtype; ValueError for another shape, rows that are not contiguous, an activation of no
    such name, or a gated weight.
    """
    dtype = check_linear(x, weight, bias, activation, multiply, residual, out_dtype, out)
    y = f32(x) @ unpack_linear(weight).T
    if bias is not None:
        y = y + bias
    y = activated(y, activation)
    if multiply is not None:
        y = y * f32(multiply)
    if residual is not None:
        y = y + f32(residual)
    result = np.empty(y.shape, dtype) if out is None else out
    result[...] = y
    return result


class Weight(Protocol):
    """(out, in), in whatever layout."""

    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def gated(self) -> bool: ...


def check_linear(
    x: Array,
    weight: Weight,
    bias: Array | None = None,
    activation: str | None = None,
    multiply: Array | None = None,
    residual: Array | None = None,
    out_dtype: DTypeLike | None = None,
    out: Array | None = None,
) -> np.dtype[Any]:
    """The arguments of linear; the dtype of its result."""
    check_product(x, weight, gated=False)
    dtype: np.dtype[Any] = np.dtype(out_dtype) if out_dtype is not None else x.dtype
    if dtype not in (float32, bfloat16):
        raise TypeError(f"out_dtype is {dtype}; it must be float32 or bfloat16")
    shape = len(x), weight.out_features
    if bias is not None:
        check_vector(bias, "bias", weight.out_features, np.float32)
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation is {activation!r}; it must be None or one of {', '.join(ACTIVATIONS)}")
    for operand, name in ((multiply, "multiply"), (residual, "residual")):
        if operand is not None:
            check_operand(operand, name, shape, dtype)
    if out is not None:
        check_output_rows(out, "out", *shape, dtype)
    return dtype


def check_product(x: Array, weight: Weight, gated: bool) -> None:
    check_float(x, "x")
    check_rows(x, "x", weight.in_features)
    if x.dtype != weight.dtype:
        raise TypeError(f"x has dtype {x.dtype}; it must be {weight.dtype}, as the weight")
    if weight.gated != gated:
        raise ValueError("weight is gated; use gated_mlp" if weight.gated else "weight is not gated; use linear")
