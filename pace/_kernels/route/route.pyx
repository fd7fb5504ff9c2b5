"""Binding of the native route; the contract is pace.reference.route."""

import numpy as np

from libc.stdint cimport int32_t
cimport numpy as cnp

from pace._kernels.runtime cimport check_rows, check_type, pace_worker, run

cnp.import_array()

cdef extern from "route/route.h":
    struct route_args:
        const float *logits
        size_t logits_stride
        size_t experts
        size_t k
        int32_t *chosen
        float *weights
    void route_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void route_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [route_avx2, route_avx512]
cdef size_t TOKENS_PER_PIECE = 64


def route(cnp.ndarray logits not None, Py_ssize_t k):
    cdef route_args args
    check_type(logits, "logits", cnp.NPY_FLOAT32)
    check_rows(logits, "logits", -1)
    cdef Py_ssize_t tokens = cnp.PyArray_DIM(logits, 0), experts = cnp.PyArray_DIM(logits, 1)
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}; it must be 1 to the {experts} experts there are")
    cdef cnp.ndarray chosen = np.empty((tokens, k), np.int32), weights = np.empty((tokens, k), np.float32)
    args.logits = <const float *>cnp.PyArray_DATA(logits)
    args.logits_stride = cnp.PyArray_STRIDE(logits, 0)
    args.experts = experts
    args.k = k
    args.chosen = <int32_t *>cnp.PyArray_DATA(chosen)
    args.weights = <float *>cnp.PyArray_DATA(weights)
    run(WORKERS, &args, tokens, TOKENS_PER_PIECE, 0)
    return chosen, weights
