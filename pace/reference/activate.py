"""Activations by themselves, with what follows them fused in: a factor."""

import numpy as np
from numpy.typing import DTypeLike

from .arrays import Array, Float, check_dtype, check_float, check_output_rows, check_rows, f32

ACTIVATIONS = ("relu", "gelu_erf", "gelu_tanh", "silu")


def activate(x: Array, activation: str, multiply: Array | None = None, out: Array | None = None) -> Array:
    """y = activation(x) · multiply, element by element.

    x: (tokens, features) float32 or bfloat16. activation: one of ACTIVATIONS. multiply: as x, or None for none. Returns
    (tokens, features) of x's dtype, in `out` where it is given; `out` may be x or multiply itself.

    In float32, rounded once, to x's dtype, at the end.

    TypeError for another dtype; ValueError for another shape, rows that are not contiguous, or an activation of no such
    name.
    """
    check_activate(x, activation, multiply, out)
    y = activated(f32(x), activation)
    if multiply is not None:
        y = y * f32(multiply)
    result = np.empty(x.shape, x.dtype) if out is None else out
    result[...] = y
    return result


def check_activate(x: Array, activation: str, multiply: Array | None, out: Array | None) -> None:
    check_float(x, "x")
    check_rows(x, "x")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    if multiply is not None:
        check_operand(multiply, "multiply", x.shape, x.dtype)
    if out is not None:
        check_output_rows(out, "out", len(x), x.shape[1], x.dtype)


def check_operand(array: Array, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    check_dtype(array, name, dtype)
    check_rows(array, name, shape[1])
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")


def activated(x: Float, name: str | None) -> Float:
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
