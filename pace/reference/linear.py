"""Linear layers with what follows them fused in: bias, activation, multiplication, residual."""

import numpy as np
from numpy.typing import DTypeLike

from .arrays import (
    Array,
    Float,
    bfloat16,
    check_dtype,
    check_float,
    check_rows,
    check_vector,
    f32,
    float32,
    output_rows,
)
from .pack_linear import PackedLinear, unpack_linear

ACTIVATIONS = ("relu", "gelu_erf", "gelu_tanh", "silu")


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
    check_product(x, weight, gated=False)
    dtype = np.dtype(out_dtype) if out_dtype is not None else x.dtype
    if dtype not in (float32, bfloat16):
        raise TypeError(f"out_dtype is {dtype}; it must be float32 or bfloat16")
    shape = (x.shape[0], weight.out_features)
    y = f32(x) @ unpack_linear(weight).T
    if bias is not None:
        check_vector(bias, "bias", weight.out_features, np.float32)
        y = y + bias
    y = activate(y, activation)
    if multiply is not None:
        check_operand(multiply, "multiply", shape, dtype)
        y = y * f32(multiply)
    if residual is not None:
        check_operand(residual, "residual", shape, dtype)
        y = y + f32(residual)
    result = output_rows(out, *shape, dtype)
    result[...] = y
    return result


def check_product(x: Array, weight: PackedLinear, gated: bool) -> None:
    check_float(x, "x")
    check_rows(x, "x", weight.in_features)
    if x.dtype != weight.dtype:
        raise TypeError(f"x has dtype {x.dtype}; it must be {weight.dtype}, as the weight")
    if weight.gated != gated:
        raise ValueError("weight is gated; use gated_mlp" if weight.gated else "weight is not gated; use linear")


def check_operand(array: Array, name: str, shape: tuple[int, int], dtype: DTypeLike) -> None:
    check_dtype(array, name, dtype)
    check_rows(array, name, shape[1])
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")


def activate(x: Float, name: str | None) -> Float:
    """The activation of that name, of float32; None leaves x as it is."""
    match name:
        case None:
            return x
        case "relu":
            return np.maximum(x, np.float32(0))
        case "silu":  # Elfwing et al. (2017): x · sigmoid(x)
            return x * sigmoid(x)
        case "gelu_erf":  # Hendrycks and Gimpel (2016)
            return np.float32(0.5) * x * (1 + erf(x * np.float32(0.5**0.5)))
        case "gelu_tanh":  # their approximation
            inner = np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)
            return np.float32(0.5) * x * (1 + f32(np.tanh(inner)))
    raise ValueError(f"activation is {name!r}; it must be None or one of {', '.join(ACTIVATIONS)}")


def sigmoid(x: Float) -> Float:
    with np.errstate(over="ignore"):  # e^-x is infinite where the sigmoid is 0
        y: Float = np.reciprocal(1 + np.exp(-x))
    return y


def erf(x: Float) -> Float:
    """The error function, within 1.5e-7: Abramowitz and Stegun, 7.1.26, in float64."""
    t = 1 / (1 + 0.3275911 * np.abs(x.astype(np.float64)))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    magnitude = 1 - series * np.exp(-(x.astype(np.float64) ** 2))
    return (np.sign(x) * magnitude).astype(np.float32)
