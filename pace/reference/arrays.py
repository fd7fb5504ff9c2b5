"""The checks and conversions that the references share. Their messages are the contract for the native bindings."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Float = NDArray[np.float32]

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float32 = np.dtype(np.float32)


def f32(x: Array) -> Float:
    """The same numbers in float32."""
    return x.astype(np.float32)


def check_float(array: Array, name: str) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; it must be a NumPy array")
    if array.dtype not in (float32, bfloat16):
        raise TypeError(f"{name} has dtype {array.dtype}; it must be float32 or bfloat16")
    check_aligned(array, name)


def check_type(array: Array, name: str, dtype: DTypeLike) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; it must be a NumPy array")
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; it must be {np.dtype(dtype)}")
    check_aligned(array, name)


def check_aligned(array: Array, name: str) -> None:
    if not array.flags.aligned:
        raise ValueError(f"{name} is not aligned to its elements")


def check_rows(array: Array, name: str, columns: int | None = None) -> None:
    """(rows, columns), any row stride, contiguous within a row; None takes any number of columns."""
    if array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        raise ValueError(
            f"{name} has shape {array.shape}; it must be (rows, {'columns' if columns is None else columns})"
        )
    if array.shape[1] > 1 and array.size and array.strides[1] != array.itemsize:
        raise ValueError(f"{name} has strides {array.strides}; its rows must be contiguous")


def check_heads(array: Array, name: str, tokens: int | None = None, head_dim: int | None = None) -> None:
    """(tokens, heads, head_dim), any token stride, contiguous within a token; None takes any number."""
    wanted = (tokens if tokens is not None else "tokens", "heads", head_dim if head_dim is not None else "head_dim")
    if array.ndim != 3 or tokens not in (None, array.shape[0]) or head_dim not in (None, array.shape[2]):
        raise ValueError(f"{name} has shape {array.shape}; it must be ({', '.join(map(str, wanted))})")
    if array.size and not array[0].flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides}; the heads of a token must be contiguous")


def check_vector(array: Array, name: str, length: int, dtype: DTypeLike) -> None:
    """A contiguous vector of `length` elements."""
    check_type(array, name, dtype)
    if array.shape != (length,):
        raise ValueError(f"{name} has shape {array.shape}; it must be ({length},)")
    if length > 1 and array.strides[0] != array.itemsize:
        raise ValueError(f"{name} has strides {array.strides}; it must be contiguous")


def check_writeable(array: Array, name: str) -> None:
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only")


def check_apart(array: Array, name: str, other: Array, other_name: str) -> None:
    """No memory in common."""
    if np.shares_memory(array, other):
        raise ValueError(f"{name} shares memory with {other_name}; they must be two arrays")


def check_dtype(array: Array, name: str, dtype: DTypeLike) -> None:
    """The dtype, float32 or bfloat16, that another array has."""
    check_float(array, name)
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; it must be {np.dtype(dtype)}")


def check_output_rows(array: Array, name: str, rows: int, columns: int, dtype: DTypeLike) -> None:
    """(rows, columns) that may be written."""
    check_dtype(array, name, dtype)
    check_rows(array, name, columns)
    if array.shape[0] != rows:
        raise ValueError(f"{name} has shape {array.shape}; it must be ({rows}, {columns})")
    check_writeable(array, name)


def check_norm(
    x: Array, weight: Array, bias: Array | None = None, residual: Array | None = None, out: Array | None = None
) -> None:
    """The arguments of a norm, with a residual or without."""
    check_float(x, "x")
    check_rows(x, "x")
    rows, hidden = x.shape
    if residual is not None:
        check_output_rows(residual, "residual", rows, hidden, x.dtype)
    check_vector(weight, "weight", hidden, np.float32)
    if bias is not None:
        check_vector(bias, "bias", hidden, np.float32)
    if out is not None:
        check_output_rows(out, "out", rows, hidden, x.dtype)
        if residual is not None:
            check_apart(out, "out", residual, "residual")


def output_rows(out: Array | None, rows: int, columns: int, dtype: DTypeLike) -> Array:
    """`out` checked, or a new array where it is None."""
    if out is None:
        return np.empty((rows, columns), dtype)
    check_output_rows(out, "out", rows, columns, dtype)
    return out
