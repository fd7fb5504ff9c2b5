"""Binding of the native activate; the contract is pace.reference.activate."""

import numpy as np

from pace.reference.activate import ACTIVATIONS

cimport numpy as cnp

from pace._kernels.runtime cimport check_kind, check_rows, kind_of, output_rows, pace_worker, run

cnp.import_array()

cdef extern from "activate/activate.h":
    struct activate_args:
        const void *x
        const void *multiply
        void *out
        size_t columns
        size_t x_stride
        size_t multiply_stride
        size_t out_stride
        int activation
        int kind
    void activate_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void activate_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [activate_avx2, activate_avx512]
cdef size_t ELEMENTS_PER_PIECE = 8192  # below this a thread costs more than it gives


def activate(cnp.ndarray x not None, str activation not None, cnp.ndarray multiply=None, out=None):
    cdef activate_args args
    args.kind = kind_of(x, "x")
    check_rows(x, "x", -1)
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, 0), columns = cnp.PyArray_DIM(x, 1)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    args.activation = 1 + ACTIVATIONS.index(activation)
    args.multiply, args.multiply_stride = NULL, 0
    if multiply is not None:
        check_kind(multiply, "multiply", args.kind)
        check_rows(multiply, "multiply", columns)
        if cnp.PyArray_DIM(multiply, 0) != rows:
            raise ValueError(f"multiply has shape {np.shape(multiply)}; it must be {(rows, columns)}")
        args.multiply = cnp.PyArray_DATA(multiply)
        args.multiply_stride = cnp.PyArray_STRIDE(multiply, 0)
    cdef cnp.ndarray result = output_rows(out, rows, columns, args.kind)
    args.x = cnp.PyArray_DATA(x)
    args.x_stride = cnp.PyArray_STRIDE(x, 0)
    args.out = cnp.PyArray_DATA(result)
    args.out_stride = cnp.PyArray_STRIDE(result, 0)
    args.columns = columns
    run(WORKERS, &args, rows, ELEMENTS_PER_PIECE // (columns + 1) + 1, 0)
    return result
