"""AMD's AOCL-DLP: products with weights in its own layout, and what follows them in the same pass.

    activation(x · weightᵀ + bias) · multiply + residual      bias, eltwise, matrix_mul, matrix_add

Products accumulate in float32 and are rounded once. The library is PACE_AOCL_DLP, a path, or what the loader finds as
libaocl-dlp.so; it has to be built with threads (OpenMP) to use more than one. Its functions say what went wrong in the
structure that they are given: that is looked at after each call.
"""

import ctypes
import os
from ctypes import POINTER, c_char, c_float, c_int, c_int64, c_size_t, c_void_p, pointer
from ctypes.util import find_library
from functools import cache, wraps
from typing import Any

import numpy as np

from pace import isa, kernels
from pace.errors import BackendError
from pace.ops.registry import Dtype, Function, register
from pace.reference.arrays import Array, Float, bfloat16, float32
from pace.reference.linear import check_linear
from pace.reference.pack_linear import PackedLinear

from .unpacked import Weight, biases_of, each_of, given, rows_apart, rows_of

NAMES = "aocl-dlp", "aocldlp", "aocl_dlp"
PAUSE_HARD = 2  # omp_pause_hard
ONE = c_float(1)  # of swish, x · sigmoid(1 · x)
ERRORS = (
    "success",
    "failure",
    "null pointer",
    "unexpected dimension of a vector",
    "not supported",
    "invalid order",
    "invalid transposition",
    "invalid memory tag",
    "invalid dimension of a matrix",
    "invalid leading dimension",
    "invalid type of matrix",
    "invalid dimension of a group",
    "invalid number of scales",
    "invalid number of zero points",
    "types that do not match",
    "no kernel could be made",
    "no kernel for this",
)
ELTWISE, BIAS, _, MATRIX_ADD, MATRIX_MUL = range(1, 6)
ACTIVATIONS = {"relu": 0, "gelu_tanh": 2, "gelu_erf": 3, "silu": 5}
TYPES = {bfloat16: 9, float32: 12}
FUNCTIONS = {float32: "f32f32f32of32", bfloat16: "bf16bf16f32of32"}


# --- the structures of aocl_gemm_post_ops.h ---


class Algorithm(ctypes.Structure):
    _fields_ = [("alpha", c_void_p), ("beta", c_void_p), ("kind", c_int), ("dtype", c_int)]


class Eltwise(ctypes.Structure):
    _fields_ = [("scale", c_void_p), ("algorithm", Algorithm)]


class Bias(ctypes.Structure):
    _fields_ = [("values", c_void_p), ("dtype", c_int), ("scale", c_void_p), ("zero", c_void_p), ("length", c_int64)]


class Scale(ctypes.Structure):
    _fields_ = [("values", c_void_p), ("length", c_int64), ("dtype", c_int), ("dimension", c_int)]


class Matrix(ctypes.Structure):
    _fields_ = [("values", c_void_p), ("stride", c_int64), ("dtype", c_int), ("scale", POINTER(Scale))]


class Metadata(ctypes.Structure):
    _fields_ = [
        ("scale", c_void_p),
        ("eltwise", POINTER(Eltwise)),
        ("bias", POINTER(Bias)),
        ("matrix_add", POINTER(Matrix)),
        ("matrix_mul", POINTER(Matrix)),
        ("length", c_int64),
        ("sequence", POINTER(c_int)),
        ("pre_ops", c_void_p),
        ("groups", c_void_p),
        *(field for name in "abcd" for field in ((f"quant_{name}", c_void_p), (f"length_{name}", c_int64))),
        ("num_eltwise", c_int64),
        ("error", c_int),
    ]


# --- the library ---


@cache
def library() -> ctypes.CDLL:
    """OSError where there is none."""
    found = filter(None, map(find_library, NAMES))
    path = os.environ.get("PACE_AOCL_DLP") or next(found, None)
    if path is None:
        raise OSError(f"there is no lib{NAMES[0]}.so")
    loaded = ctypes.CDLL(path)
    for name in FUNCTIONS.values():
        size, reorder = (getattr(loaded, f"aocl_{what}_{name}") for what in ("get_reorder_buf_size", "reorder"))
        size.restype, size.argtypes = c_size_t, [c_char] * 3 + [c_int64] * 2 + [POINTER(Metadata)]
        reorder.restype = None
        reorder.argtypes = [c_char] * 3 + [c_void_p] * 2 + [c_int64] * 3 + [POINTER(Metadata)]
    for name in ("f32f32f32of32", "bf16bf16f32of32", "bf16bf16f32obf16"):
        gemm = getattr(loaded, f"aocl_gemm_{name}")
        matrix = [c_void_p, c_int64, c_char]
        gemm.restype = None
        gemm.argtypes = [c_char] * 3 + [c_int64] * 3 + [c_float, *matrix, *matrix, c_float, c_void_p, c_int64]
        gemm.argtypes += [POINTER(Metadata)]
    for name in ("library", "local"):
        getattr(loaded, f"dlp_thread_set_num_threads_{name}").argtypes = [c_int64]
    loaded.dlp_thread_set_num_threads_library(1)
    return loaded


def threaded(function: Function) -> Function:
    """On as many threads as our kernels have now. All else is on one, and leaves none behind: a process that has begun
    threads of OpenMP can't be forked, as a server's node is.
    """

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        library().dlp_thread_set_num_threads_local(isa.get_num_threads())
        try:
            return function(*arguments, **named)
        finally:
            library().dlp_thread_set_num_threads_local(1)

    return call


def missing() -> str | None:
    try:
        library()
    except (OSError, AttributeError) as error:
        return f"AOCL-DLP can't be loaded ({error}): PACE_AOCL_DLP may be the path of its shared library"
    return None if dtypes() else "this AOCL-DLP has no products that are right here"


def register_all() -> None:
    linears: dict[str, Function] = {"pack_linear": kernels.pack_linear, "prepare": prepare, "linear": threaded(linear)}
    for operator in ("linear", "qkv_projection", "out_projection", "lm_head"):
        register(operator, "AOCLDLP", linears, dtypes(), in_panels=False)
    whole: dict[str, Function] = {"pack_linear": kernels.pack_linear, "prepare": each_of(prepare), "mlp": threaded(mlp)}
    register("mlp", "AOCLDLP", whole, dtypes(), in_panels=False)


def describe() -> str:
    numbers = [c_int() for _ in range(3)]
    library().dlp_version_query(*(ctypes.byref(number) for number in numbers))
    return f"AOCL-DLP {'.'.join(str(number.value) for number in numbers)}"


@cache
def dtypes() -> tuple[Dtype, ...]:
    """Those that its instructions on this host allow, and in which a product of small whole numbers is right."""
    return tuple(dtype for dtype in (float32, bfloat16) if _right(dtype))


def _right(dtype: Dtype) -> bool:
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-4, 5, (rows, 134)).astype(dtype) for rows in (5, 19))
    try:
        sums = linear(x, reordered(weight), out_dtype=float32)
    except BackendError:
        return False
    return np.array_equal(sums, x.astype(np.float32) @ weight.astype(np.float32).T)


def check(metadata: Metadata, what: str) -> None:
    """BackendError where a call did not do what it was for."""
    if metadata.error:
        reason = ERRORS[metadata.error] if 0 <= metadata.error < len(ERRORS) else f"error {metadata.error}"
        raise BackendError(f"AOCL-DLP: {what}: {reason}")


# --- weights ---


def prepare(packed: PackedLinear) -> Weight:
    return reordered(rows_of(packed))


def reordered(rows: Array) -> Weight:
    """Of (out, in)."""
    out_features, in_features = rows.shape
    name, metadata = FUNCTIONS[rows.dtype], Metadata()
    loaded = library()
    order = b"r", b"t", b"B"
    size = getattr(loaded, f"aocl_get_reorder_buf_size_{name}")(*order, in_features, out_features, metadata)
    check(metadata, f"the size of a weight of {out_features} × {in_features} in {rows.dtype}")
    values = aligned(size)
    getattr(loaded, f"aocl_reorder_{name}")(
        *order, rows.ctypes.data, values.ctypes.data, in_features, out_features, in_features, metadata
    )
    check(metadata, f"the layout of a weight of {out_features} × {in_features} in {rows.dtype}")
    if hasattr(loaded, "omp_pause_resource_all"):  # with the threads that the library has begun as it was first called
        loaded.omp_pause_resource_all(PAUSE_HARD)
    return Weight(values, out_features, in_features, rows.dtype, size)


def aligned(size: int) -> Array:
    """Bytes, zero, from a cache line's beginning on."""
    memory = np.zeros(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size]


# --- products ---


def linear(
    x: Array,
    weight: Weight,
    bias: Float | None = None,
    activation: str | None = None,
    multiply: Array | None = None,
    residual: Array | None = None,
    out_dtype: Any = None,
    out: Array | None = None,
) -> Array:
    """As pace.reference.linear."""
    kind = check_linear(x, weight, bias, activation, multiply, residual, out_dtype, out)
    if x.dtype == float32 and kind == bfloat16:  # what the library has no product for
        wide = (None if each is None else each.astype(np.float32) for each in (multiply, residual))
        return given(linear(x, weight, bias, activation, *wide).astype(bfloat16), out)
    whole = out is not None and out.flags.c_contiguous
    result = out if out is not None and whole else np.empty((len(x), weight.out_features), kind)
    sequence, metadata, held = [], Metadata(), []
    if bias is not None:
        sequence.append(BIAS)
        metadata.bias = pointer(Bias(bias.ctypes.data, TYPES[float32], None, None, len(bias)))
    if activation is not None:
        sequence.append(ELTWISE)
        metadata.num_eltwise = 1
        metadata.eltwise = pointer(
            Eltwise(None, Algorithm(ctypes.addressof(ONE), None, ACTIVATIONS[activation], TYPES[float32]))
        )
    for field, operation, operand in (("matrix_mul", MATRIX_MUL, multiply), ("matrix_add", MATRIX_ADD, residual)):
        if operand is not None:
            operand, stride = rows_apart(operand)
            held.append(operand)
            sequence.append(operation)
            values = Matrix(operand.ctypes.data, stride, TYPES[operand.dtype], None)
            setattr(metadata, field, pointer(values))
    metadata.length, metadata.sequence = len(sequence), (c_int * max(len(sequence), 1))(*sequence)
    if len(x):
        x, stride = rows_apart(x)
        name = (
            FUNCTIONS[float32]
            if x.dtype == float32
            else "bf16bf16f32obf16"
            if kind == bfloat16
            else FUNCTIONS[bfloat16]
        )
        getattr(library(), f"aocl_gemm_{name}")(
            *(b"r", b"n", b"t"),
            *(len(x), weight.out_features, weight.in_features),
            *(1.0, x.ctypes.data, stride, b"n"),
            *(weight.values.ctypes.data, weight.in_features, b"r"),
            *(0.0, result.ctypes.data, weight.out_features),
            metadata,
        )
        check(metadata, f"a product of {len(x)} rows, {weight.in_features} to {weight.out_features} in {x.dtype}")
    return result if whole else given(result, out)


def mlp(
    x: Array,
    weights: tuple[Weight, ...],
    up_bias: Float | None,
    down_bias: Float | None,
    activation: str,
    residual: Array | None = None,
) -> Array:
    """As pace.ops.mlp."""
    *ups, down = weights
    biases = biases_of(up_bias, ups)
    inner = linear(x, ups[0], biases[0], activation)
    if len(ups) == 2:
        inner = linear(x, ups[1], biases[1], multiply=inner)
    return linear(inner, down, down_bias, residual=residual)
