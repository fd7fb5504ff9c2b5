"""Binding of the native add_layer_norm; the contract is pace.reference.add_layer_norm."""

cimport numpy as cnp

from pace._kernels.runtime cimport (
    check_apart, check_output_rows, check_rows, check_vector, kind_of, output_rows, pace_worker, run
)

cnp.import_array()

cdef extern from "add_layer_norm/add_layer_norm.h":
    struct add_layer_norm_args:
        const void *x
        void *residual
        const float *weight
        const float *bias
        void *out
        size_t hidden
        size_t x_stride
        size_t residual_stride
        size_t out_stride
        float eps
        int kind
    void add_layer_norm_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void add_layer_norm_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [add_layer_norm_avx2, add_layer_norm_avx512]
cdef size_t ELEMENTS_PER_PIECE = 16384  # below this a thread costs more than it gives


def add_layer_norm(
    cnp.ndarray x not None,
    cnp.ndarray residual not None,
    cnp.ndarray weight not None,
    cnp.ndarray bias,
    float eps=1e-5,
    out=None,
):
    cdef add_layer_norm_args args
    cdef int kind = kind_of(x, "x")
    check_rows(x, "x", -1)
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, 0), hidden = cnp.PyArray_DIM(x, 1)
    check_output_rows(residual, "residual", rows, hidden, kind)
    check_vector(weight, "weight", hidden, cnp.NPY_FLOAT32)
    args.bias = NULL
    if bias is not None:
        check_vector(bias, "bias", hidden, cnp.NPY_FLOAT32)
        args.bias = <const float *>cnp.PyArray_DATA(bias)
    cdef cnp.ndarray result = output_rows(out, rows, hidden, kind)
    check_apart(result, "out", residual, "residual")
    args.x = cnp.PyArray_DATA(x)
    args.residual = cnp.PyArray_DATA(residual)
    args.weight = <const float *>cnp.PyArray_DATA(weight)
    args.out = cnp.PyArray_DATA(result)
    args.hidden = hidden
    args.x_stride = cnp.PyArray_STRIDE(x, 0)
    args.residual_stride = cnp.PyArray_STRIDE(residual, 0)
    args.out_stride = cnp.PyArray_STRIDE(result, 0)
    args.eps = eps
    args.kind = kind
    run(WORKERS, &args, rows, ELEMENTS_PER_PIECE // (hidden + 1) + 1, 0)
    return result
