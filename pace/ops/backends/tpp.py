"""libxsmm's batch-reduce products, made for their shapes at run time; what follows a product is ours, in the same pass.

A panel is what libxsmm calls A, sixteen outputs by all features: our weights are its blocked weights as they are, those
in bfloat16 in pairs (VNNI). A kernel sums over blocks of features into float32, for a block of rows; bias, activation,
factor and residual come to the sums while they are in the cache, and one rounding. So it is with the gated MLP, whose
projection down is one sum in float32.

The library is PACE_LIBXSMM, a path, or what the loader finds as libxsmm.so. Version 1, whose kernels take plain
arguments, and 2, whose take a struct, both do: which it is, and in which dtypes its kernels are right on this host, is
found out by small products. LIBXSMM_TARGET is libxsmm's own choice of instructions; without it, they are our rung's.
"""

import ctypes
import logging
import os
from abc import ABC, abstractmethod
from ctypes import byref, c_float, c_int
from ctypes.util import find_library
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np

from pace import isa, kernels
from pace.ops.mlp import in_panels, mlp_of
from pace.ops.registry import Dtype, Function, register
from pace.reference.arrays import Array, Float, bfloat16, float32
from pace.reference.linear import check_product
from pace.reference.pack_linear import PANEL, PackedLinear, pack_linear

from . import native
from .unpacked import rows_apart

logger = logging.getLogger("pace")

BLOCK = 64  # features
SUMS_STRIDE = 2 * PANEL  # of the rows of sums, as pace/_kernels/linear keeps them
TARGETS = {"avx2": b"hsw", "avx512": b"cpx"}  # by rung, as libxsmm names them
KERNELS = 4096  # shapes whose kernels are known at a time
PROBED = (1, 5, 121)  # rows


def missing() -> str | None:
    reason = native.missing()
    if reason is not None:
        return reason
    try:
        found = library()
    except (OSError, AttributeError) as error:
        return f"libxsmm can't be loaded ({error}): PACE_LIBXSMM may be the path of its shared library"
    return None if dtypes() else f"{found} has no kernels that are right here"


def register_all() -> None:
    linears: dict[str, Function] = {"pack_linear": kernels.pack_linear, "prepare": in_panels, "linear": linear}
    for operator in ("linear", "qkv_projection", "out_projection", "lm_head"):
        register(operator, "TPP", linears, dtypes())
    whole: dict[str, Function] = {
        "pack_linear": kernels.pack_linear,
        "prepare": in_panels,
        "mlp": mlp_of(linear, gated_mlp),
    }
    register("mlp", "TPP", whole, dtypes())


def describe() -> str:
    return str(library())


# --- the library ---


class Library(ABC):
    """Makes kernels: of `rows` rows, x_stride elements apart, and so many features at a time."""

    API: ClassVar[int]
    TYPES: ClassVar[dict[Dtype, int]] = {float32: 1, bfloat16: 2}

    def __init__(self, name: str, loaded: ctypes.CDLL) -> None:
        self.name, self._loaded = name, loaded
        loaded.libxsmm_init()  # which would choose a target anew, if it came later
        if "LIBXSMM_TARGET" not in os.environ:
            loaded.libxsmm_set_target_arch(TARGETS[isa.RUNG])
        loaded.libxsmm_get_target_arch.restype = ctypes.c_char_p

    def __str__(self) -> str:
        return f"{self.name} (interface {self.API}, {self._loaded.libxsmm_get_target_arch().decode()})"

    @abstractmethod
    def blocks(self, dtype: Dtype, rows: int, x_stride: int) -> int:
        """The address of a kernel over blocks of BLOCK features, that begins with sums of 0; 0 where there is none."""

    @abstractmethod
    def one(self, dtype: Dtype, rows: int, x_stride: int, features: int, add: bool) -> int:
        """Over so many features; add: to the sums that there are."""


class Library1(Library):
    API = 1
    BETA_0, VNNI_A = 16, 32768
    NAMES: ClassVar[dict[Dtype, str]] = {float32: "s", bfloat16: "bs"}

    def blocks(self, dtype: Dtype, rows: int, x_stride: int) -> int:
        dispatch = getattr(self._loaded, f"libxsmm_{self.NAMES[dtype]}mmdispatch_reducebatch_strd")
        dispatch.restype = ctypes.c_void_p
        apart = BLOCK * PANEL * dtype.itemsize, BLOCK * dtype.itemsize
        return dispatch(PANEL, rows, BLOCK, *apart, *self._more(dtype, x_stride, add=False)) or 0

    def one(self, dtype: Dtype, rows: int, x_stride: int, features: int, add: bool) -> int:
        dispatch = getattr(self._loaded, f"libxsmm_{self.NAMES[dtype]}mmdispatch")
        dispatch.restype = ctypes.c_void_p
        return dispatch(PANEL, rows, features, *self._more(dtype, x_stride, add)) or 0

    def _more(self, dtype: Dtype, x_stride: int, add: bool) -> tuple[Any, ...]:
        flags = (self.VNNI_A if dtype == bfloat16 else 0) | (0 if add else self.BETA_0)
        strides = (byref(c_int(each)) for each in (PANEL, x_stride, SUMS_STRIDE))
        return *strides, byref(c_float(1)), byref(c_float(add)), byref(c_int(flags)), byref(c_int(0))


class Shape(ctypes.Structure):
    """libxsmm_gemm_shape"""

    _fields_ = [(name, c_int) for name in ("m", "n", "k", "lda", "ldb", "ldc", "a", "b", "out", "sum")]


class Reduction(ctypes.Structure):
    """libxsmm_gemm_batch_reduce_config"""

    _fields_ = [("kind", c_int), ("a", c_int), ("b", c_int), ("unroll", ctypes.c_ubyte)]


class Library2(Library):
    API = 2
    BETA_0, VNNI_A = 4, 256
    STRIDED = 4

    def blocks(self, dtype: Dtype, rows: int, x_stride: int) -> int:
        dispatch = self._loaded.libxsmm_dispatch_brgemm
        dispatch.restype = ctypes.c_void_p
        apart = Reduction(self.STRIDED, BLOCK * PANEL * dtype.itemsize, BLOCK * dtype.itemsize, 0)
        return dispatch(*self._shape(dtype, rows, x_stride, BLOCK, add=False), 0, apart) or 0

    def one(self, dtype: Dtype, rows: int, x_stride: int, features: int, add: bool) -> int:
        dispatch = self._loaded.libxsmm_dispatch_gemm
        dispatch.restype = ctypes.c_void_p
        return dispatch(*self._shape(dtype, rows, x_stride, features, add), 0) or 0

    def _shape(self, dtype: Dtype, rows: int, x_stride: int, features: int, add: bool) -> tuple[Any, ...]:
        kind, sums = self.TYPES[dtype], self.TYPES[float32]
        flags = (self.VNNI_A if dtype == bfloat16 else 0) | (0 if add else self.BETA_0)
        return Shape(PANEL, rows, features, PANEL, x_stride, SUMS_STRIDE, kind, kind, sums, sums), flags


@cache
def library() -> Library:
    """OSError where there is none."""
    path = os.environ.get("PACE_LIBXSMM") or find_library("xsmm")
    if path is None:
        raise OSError("there is no libxsmm.so")
    loaded = ctypes.CDLL(path)
    if hasattr(loaded, "libxsmm_dispatch_brgemm"):
        return Library2(os.path.basename(path), loaded)
    if hasattr(loaded, "libxsmm_smmdispatch_reducebatch_strd"):
        return Library1(os.path.basename(path), loaded)
    raise OSError(f"{path} has no batch-reduce products of libxsmm")


@cache
def dtypes() -> tuple[Dtype, ...]:
    """Those in which its kernels are right: products of small whole numbers, which are exact."""
    return tuple(dtype for dtype in (float32, bfloat16) if all(_right(dtype, rows) for rows in PROBED))


def _right(dtype: Dtype, rows: int) -> bool:
    rng, features = np.random.default_rng(0), 2 * BLOCK + 6
    x, weight = (rng.integers(-4, 5, (n, features)).astype(dtype) for n in (rows, PANEL + 3))
    made = brgemm(dtype, rows, features, features)
    if made is None:
        return False
    from pace._kernels.linear.linear import linear_by

    sums = linear_by(made, x, pack_linear(weight), out_dtype=float32)
    return np.array_equal(sums, x.astype(np.float32) @ weight.astype(np.float32).T)


@lru_cache(KERNELS)
def brgemm(dtype: Dtype, rows: int, features: int, x_stride: int) -> Any:
    """The kernels for a product; None where the library lacks one. `features` of bfloat16 are even."""
    from pace._kernels.linear.linear import ROWS_PER_KERNEL, Brgemm

    count, left = divmod(features, BLOCK)
    blocks, rest = [0, 0], [0, 0]
    for i, number in enumerate((ROWS_PER_KERNEL, rows % ROWS_PER_KERNEL)):
        if number == 0 or (i == 0 and rows < ROWS_PER_KERNEL):
            continue
        if count:
            blocks[i] = library().blocks(dtype, number, x_stride)
        if left:
            rest[i] = library().one(dtype, number, x_stride, left, add=count > 0)
        if (count and not blocks[i]) or (left and not rest[i]):
            return None
    size = count * BLOCK * dtype.itemsize
    return Brgemm(rows, x_stride * dtype.itemsize, library().API, count, size * PANEL, size, blocks, rest)


# --- products ---


def linear(
    x: Array,
    weight: PackedLinear,
    bias: Float | None = None,
    activation: str | None = None,
    multiply: Array | None = None,
    residual: Array | None = None,
    out_dtype: Any = None,
    out: Array | None = None,
) -> Array:
    """As pace.reference.linear."""
    from pace._kernels.linear.linear import linear_by

    x, made = prepared(x, weight)
    return linear_by(made, x, weight, bias, activation, multiply, residual, out_dtype, out)  # type: ignore[no-any-return]


def gated_mlp(
    x: Array, weight: PackedLinear, bias: Float | None = None, activation: str = "silu", out: Array | None = None
) -> Array:
    """As pace.reference.gated_mlp."""
    from pace._kernels.gated_mlp.gated_mlp import gated_mlp_by

    x, made = prepared(x, weight)
    return gated_mlp_by(made, x, weight, bias, activation, out)  # type: ignore[no-any-return]


def prepared(x: Array, weight: PackedLinear) -> tuple[Array, Any]:
    """x, and the kernels for it. bfloat16 comes in pairs: where the features are odd, each row is followed by a zero,
    and rows begin where pairs do. Where there are no kernels, None: it is NATIVE's then.
    """
    check_product(x, weight, weight.gated)
    if not len(x):
        return x, None
    features, (x, stride) = weight.in_features, rows_apart(x)
    if x.dtype == bfloat16 and (features % 2 or stride % 2):
        wider = np.zeros((len(x), features + features % 2), bfloat16)
        wider[:, :features] = x
        x, features = wider[:, :features], wider.shape[1]
        stride = features
    made = brgemm(x.dtype, len(x), features, stride)
    if made is None:
        _say(x.dtype, features)
    return x, made


@cache
def _say(dtype: Dtype, features: int) -> None:
    logger.warning("TPP: libxsmm has no kernel for some rows of %d features in %s: using NATIVE", features, dtype)
