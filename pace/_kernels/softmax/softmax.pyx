"""Binding of the native softmax; the contract is pace.reference.softmax."""

cimport numpy as cnp

from pace._kernels.runtime cimport check_rows, kind_of, output_rows, pace_worker, run

cnp.import_array()

cdef extern from "softmax/softmax.h":
    struct softmax_args:
        const void *x
        void *out
        size_t columns
        size_t x_stride
        size_t out_stride
        float scale
        int kind
    void softmax_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void softmax_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [softmax_avx2, softmax_avx512]
cdef size_t ELEMENTS_PER_PIECE = 8192  # below this a thread costs more than it gives


def softmax(cnp.ndarray x not None, float scale=1.0, out=None):
    cdef softmax_args args
    args.kind = kind_of(x, "x")
    check_rows(x, "x", -1)
    cdef Py_ssize_t rows = cnp.PyArray_DIM(x, 0), columns = cnp.PyArray_DIM(x, 1)
    cdef cnp.ndarray result = output_rows(out, rows, columns, args.kind)
    args.x = cnp.PyArray_DATA(x)
    args.out = cnp.PyArray_DATA(result)
    args.columns = columns
    args.x_stride = cnp.PyArray_STRIDE(x, 0)
    args.out_stride = cnp.PyArray_STRIDE(result, 0)
    args.scale = scale
    run(WORKERS, &args, rows, ELEMENTS_PER_PIECE // (columns + 1) + 1, 0)
    return result
