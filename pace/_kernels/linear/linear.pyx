"""Binding of the native linear; the contract is pace.reference.linear."""

import numpy as np

from pace.reference.arrays import bfloat16, float32
from pace.reference.activate import ACTIVATIONS
from pace.reference.pack_linear import PackedLinear

from libc.stdlib cimport free, malloc
from libc.string cimport memset
cimport numpy as cnp

from pace._kernels.runtime cimport BF16, F32, check_rows, check_vector, kind_of, output_rows, pace_worker, run

cnp.import_array()

cdef extern from "linear/linear.h":
    void linear_arrange_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void linear_arrange_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void linear_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void linear_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] ARRANGE = [linear_arrange_avx2, linear_arrange_avx512]
cdef pace_worker[2] WORKERS = [linear_avx2, linear_avx512]
cdef size_t ROWS_PER_PIECE = 24
cdef dict ACTIVATION_NUMBERS = {None: 0} | {name: i + 1 for i, name in enumerate(ACTIVATIONS)}


ROWS_PER_KERNEL = ROWS_PER_BLOCK  # of a Brgemm, at most


cdef class Brgemm:
    def __init__(self, size_t rows, size_t x_stride, int api, unsigned long long count, size_t panel_bytes,
                 size_t x_bytes, blocks, left):
        """rows of x, x_stride bytes apart. api: 1 or 2, of libxsmm. count: blocks of features, which are panel_bytes of
        a panel and x_bytes of a row. blocks, left: addresses of the kernels for those and for what is left of the
        features; each of ROWS_PER_KERNEL rows, and of the rows after; 0 where there is nothing to do.
        """
        self.rows, self.x_stride = rows, x_stride
        self.kernels.api, self.kernels.count = api, count
        self.kernels.panel_bytes, self.kernels.x_bytes = panel_bytes, x_bytes
        for i in range(2):
            self.kernels.blocks[i] = <const void *><size_t>blocks[i]
            self.kernels.left[i] = <const void *><size_t>left[i]


cdef int set_brgemm(linear_args *args, Brgemm made) except -1:
    """After x is set."""
    if made is not None:
        if args.rows != made.rows or (args.rows > 1 and args.x_stride != made.x_stride):
            raise ValueError(f"x has {args.rows} rows, {args.x_stride} bytes apart; the kernels are for "
                             f"{made.rows}, {made.x_stride} bytes apart")
        args.brgemm = &made.kernels
    return 0


cdef int set_weight(linear_args *args, object weight, bint gated) except -1:
    if not isinstance(weight, PackedLinear):
        raise TypeError(f"weight is a {type(weight).__name__}; it must be a PackedLinear")
    cdef cnp.ndarray panels = weight.panels
    memset(args, 0, sizeof(linear_args))
    if <bint>weight.gated != gated:
        raise ValueError("weight is gated; use gated_mlp" if weight.gated else "weight is not gated; use linear")
    args.kind = kind_of(panels, "weight")
    args.panels = <const unsigned *>cnp.PyArray_DATA(panels)
    args.num_panels = cnp.PyArray_DIM(panels, 0)
    args.in_features = weight.in_features
    args.out_features = weight.out_features
    return 0


cdef int set_x(linear_args *args, cnp.ndarray x, object weight) except -1:
    cdef int kind = kind_of(x, "x")
    check_rows(x, "x", args.in_features)
    if kind != args.kind:
        raise TypeError(f"x has dtype {x.dtype}; it must be {weight.dtype}, as the weight")
    args.x = cnp.PyArray_DATA(x)
    args.x_stride = cnp.PyArray_STRIDE(x, 0)
    args.rows = cnp.PyArray_DIM(x, 0)
    return 0


cdef int set_activation(linear_args *args, str activation) except -1:
    number = ACTIVATION_NUMBERS.get(activation)
    if number is None:
        raise ValueError(f"activation is {activation!r}; it must be None or one of {', '.join(ACTIVATIONS)}")
    args.activation = number
    return 0


cdef int set_bias(linear_args *args, cnp.ndarray bias, Py_ssize_t length) except -1:
    if bias is not None:
        check_vector(bias, "bias", length, cnp.NPY_FLOAT32)
        args.bias = <const float *>cnp.PyArray_DATA(bias)
    return 0


cdef const void *operand(cnp.ndarray array, str name, linear_args *args, size_t *stride) except? NULL:
    if array is None:
        return NULL
    if kind_of(array, name) != args.out_kind:
        wanted = "bfloat16" if args.out_kind == BF16 else "float32"
        raise TypeError(f"{name} has dtype {array.dtype}; it must be {wanted}")
    check_rows(array, name, args.out_features)
    if <size_t>cnp.PyArray_DIM(array, 0) != args.rows:
        raise ValueError(f"{name} has shape {np.shape(array)}; it must be {(args.rows, args.out_features)}")
    stride[0] = cnp.PyArray_STRIDE(array, 0)
    return cnp.PyArray_DATA(array)


cdef int run_product(const pace_worker *workers, linear_args *args) except -1:
    """Arrange x for the tiles, then multiply."""
    cdef size_t blocks = (args.rows + ROWS_PER_BLOCK - 1) // ROWS_PER_BLOCK
    cdef size_t items = blocks * ((args.num_panels + 1) // 2)
    if args.brgemm != NULL:
        run(workers, args, items, 1, 0)
        return 0
    # Four bytes an element is the most that any rung wants; a pair of bfloat16 may be two float32.
    args.a = <unsigned *>malloc(args.rows * (args.in_features + 1) * 4)
    if args.a == NULL:
        raise MemoryError(f"no memory to arrange x of shape {(args.rows, args.in_features)}")
    try:
        run(ARRANGE, args, args.rows, ROWS_PER_PIECE, 0)
        run(workers, args, items, 1, 0)
    finally:
        free(args.a)
    return 0


def linear(cnp.ndarray x not None, weight, cnp.ndarray bias=None, str activation=None, cnp.ndarray multiply=None,
           cnp.ndarray residual=None, out_dtype=None, out=None):
    return linear_by(None, x, weight, bias, activation, multiply, residual, out_dtype, out)


def linear_by(Brgemm made, cnp.ndarray x not None, weight, cnp.ndarray bias=None, str activation=None,
              cnp.ndarray multiply=None, cnp.ndarray residual=None, out_dtype=None, out=None):
    """As linear; with kernels that are not ours, where `made` has them."""
    cdef linear_args args
    set_weight(&args, weight, False)
    set_x(&args, x, weight)
    set_brgemm(&args, made)
    args.out_kind = args.kind
    if out_dtype is not None:
        dtype = np.dtype(out_dtype)
        if dtype not in (float32, bfloat16):
            raise TypeError(f"out_dtype is {dtype}; it must be float32 or bfloat16")
        args.out_kind = F32 if dtype == float32 else BF16
    set_bias(&args, bias, args.out_features)
    set_activation(&args, activation)
    args.multiply = operand(multiply, "multiply", &args, &args.multiply_stride)
    args.residual = operand(residual, "residual", &args, &args.residual_stride)
    cdef cnp.ndarray result = output_rows(out, args.rows, args.out_features, args.out_kind)
    args.out = cnp.PyArray_DATA(result)
    args.out_stride = cnp.PyArray_STRIDE(result, 0)
    run_product(WORKERS, &args)
    return result
