"""The checks and conversions that the references share. Their messages are the contract for the native bindings."""

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[np.generic]
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


def check_rows(array: Array, name: str, columns: int | None = None) -> None:
    """(rows, columns), any row stride, contiguous within a row; None takes any number of columns."""
    if array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        raise ValueError(f"{name} has shape {array.shape}; it must be (rows, {columns or 'columns'})")
    if array.shape[1] > 1 and array.size and array.strides[1] != array.itemsize:
        raise ValueError(f"{name} has strides {array.strides}; its rows must be contiguous")


def check_vector(array: Array, name: str, length: int, dtype: DTypeLike) -> None:
    """A contiguous vector of `length` elements."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; it must be a NumPy array")
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; it must be {np.dtype(dtype)}")
    if array.shape != (length,):
        raise ValueError(f"{name} has shape {array.shape}; it must be ({length},)")
    if length > 1 and array.strides[0] != array.itemsize:
        raise ValueError(f"{name} has strides {array.strides}; it must be contiguous")


def output_rows(out: Array | None, rows: int, columns: int, dtype: DTypeLike) -> Array:
    """`out` checked, or a new array where it is None."""
    if out is None:
        return np.empty((rows, columns), dtype)
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; it must be {np.dtype(dtype)}")
    check_rows(out, "out", columns)
    if out.shape[0] != rows:
        raise ValueError(f"out has shape {out.shape}; it must be ({rows}, {columns})")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    return out
