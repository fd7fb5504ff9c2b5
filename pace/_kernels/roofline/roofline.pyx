"""Binding of the machine's limits (pace.roofline): each function does known work and returns how much."""

import numpy as np

cimport numpy as cnp

from pace._kernels import runtime
from pace._kernels.runtime cimport pace_worker, run

cnp.import_array()

cdef extern from "roofline/roofline.h":
    enum: ROOFLINE_BLOCK_BYTES, ROOFLINE_CHAINS, ROOFLINE_STEPS
    struct roofline_args:
        char *buffer
        const float *seed
        float *sink
    void roofline_touch_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void roofline_touch_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void roofline_read_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void roofline_read_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void roofline_fma_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void roofline_fma_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void roofline_dot_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] TOUCH = [roofline_touch_avx2, roofline_touch_avx512]
cdef pace_worker[2] READ = [roofline_read_avx2, roofline_read_avx512]
cdef pace_worker[2] FMA = [roofline_fma_avx2, roofline_fma_avx512]
cdef pace_worker[2] DOT = [roofline_fma_avx2, roofline_dot_avx512]

# Floating-point operations of one instruction: two a lane, and four where a lane takes a pair of bfloat16.
FMA_FLOPS = {"avx2": 2 * 8, "avx512": 2 * 16}
DOT_FLOPS = {"avx2": 2 * 8, "avx512": 4 * 16}

BLOCK_BYTES = ROOFLINE_BLOCK_BYTES


cdef size_t work(const pace_worker *workers, object buffer, size_t items) except? 0:
    cdef roofline_args args
    cdef cnp.ndarray seed = np.full((ROOFLINE_CHAINS + 2, 16), 0.5, np.float32)  # x/2 + 1/2: no chain grows or dies
    cdef cnp.ndarray sink = np.empty(items, np.float32)
    seed[2:] = np.arange(1, ROOFLINE_CHAINS + 1).reshape(-1, 1)
    args.buffer = NULL if buffer is None else <char *>cnp.PyArray_DATA(<cnp.ndarray>buffer)
    args.seed = <const float *>cnp.PyArray_DATA(seed)
    args.sink = <float *>cnp.PyArray_DATA(sink)
    run(workers, &args, items, 1, 0)
    return items


def touch(cnp.ndarray buffer not None):
    """Write the buffer, so that its pages exist; returns the bytes written."""
    return work(TOUCH, buffer, buffer.nbytes // BLOCK_BYTES) * BLOCK_BYTES


def read(cnp.ndarray buffer not None):
    """Read the buffer once, in whole blocks; returns the bytes read."""
    return work(READ, buffer, buffer.nbytes // BLOCK_BYTES) * BLOCK_BYTES


def fma(size_t items):
    """Fused multiply-adds in float32; returns the floating-point operations done."""
    return work(FMA, None, items) * ROOFLINE_CHAINS * ROOFLINE_STEPS * FMA_FLOPS[runtime.get_rung()]


def dot(size_t items):
    """Multiply-adds of bfloat16 pairs into float32; returns the floating-point operations done."""
    return work(DOT, None, items) * ROOFLINE_CHAINS * ROOFLINE_STEPS * DOT_FLOPS[runtime.get_rung()]
