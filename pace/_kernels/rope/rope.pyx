"""Binding of the native rope; the contract is pace.reference.rope."""

from libc.stdint cimport int32_t

cimport numpy as cnp
import numpy as np

from pace._kernels.runtime cimport (
    check_heads, check_kind, check_type, check_vector, check_writeable, kind_of, pace_worker, run
)

cnp.import_array()

cdef extern from "rope/rope.h":
    struct rope_args:
        void *q
        void *k
        const float *cos
        const float *sin
        const int32_t *positions
        size_t heads
        size_t kv_heads
        size_t head_dim
        size_t half
        size_t q_stride
        size_t k_stride
        int kind
        bint interleaved
    void rope_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void rope_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [rope_avx2, rope_avx512]
cdef size_t ELEMENTS_PER_PIECE = 16384  # below this a thread costs more than it gives


cdef int check_table(cnp.ndarray table, str name) except -1:
    check_type(table, name, cnp.NPY_FLOAT32)
    if cnp.PyArray_NDIM(table) != 2:
        raise ValueError(f"{name} has shape {np.shape(table)}; it must be (positions, rotary_dim/2)")
    if not cnp.PyArray_IS_C_CONTIGUOUS(table):
        raise ValueError(f"{name} has strides {(<object>table).strides}; it must be contiguous")
    return 0


def rope(
    cnp.ndarray q not None,
    cnp.ndarray k not None,
    cnp.ndarray cos not None,
    cnp.ndarray sin not None,
    cnp.ndarray positions not None,
    bint interleaved=False,
):
    cdef rope_args args
    cdef int kind = kind_of(q, "q")
    check_heads(q, "q", -1, -1)
    cdef Py_ssize_t tokens = cnp.PyArray_DIM(q, 0), head_dim = cnp.PyArray_DIM(q, 2)
    check_kind(k, "k", kind)
    check_heads(k, "k", tokens, head_dim)
    check_writeable(q, "q")
    check_writeable(k, "k")
    check_table(cos, "cos")
    check_table(sin, "sin")
    cdef Py_ssize_t num_positions = cnp.PyArray_DIM(cos, 0), half = cnp.PyArray_DIM(cos, 1)
    if cnp.PyArray_DIM(sin, 0) != num_positions or cnp.PyArray_DIM(sin, 1) != half:
        raise ValueError(f"sin has shape {np.shape(sin)}; it must be {np.shape(cos)}, as cos")
    if 2 * half > head_dim:
        columns = head_dim // 2
        raise ValueError(f"cos has shape {np.shape(cos)}; it must have at most {columns} columns, half of head_dim")
    check_vector(positions, "positions", tokens, cnp.NPY_INT32)
    args.positions = <const int32_t *>cnp.PyArray_DATA(positions)
    cdef Py_ssize_t token
    for token in range(tokens):
        if args.positions[token] < 0 or args.positions[token] >= num_positions:
            place = args.positions[token]
            raise ValueError(f"positions[{token}] is {place}; the tables have {num_positions} positions")
    args.q = cnp.PyArray_DATA(q)
    args.k = cnp.PyArray_DATA(k)
    args.cos = <const float *>cnp.PyArray_DATA(cos)
    args.sin = <const float *>cnp.PyArray_DATA(sin)
    args.heads = cnp.PyArray_DIM(q, 1)
    args.kv_heads = cnp.PyArray_DIM(k, 1)
    args.head_dim = head_dim
    args.half = half
    args.q_stride = cnp.PyArray_STRIDE(q, 0)
    args.k_stride = cnp.PyArray_STRIDE(k, 0)
    args.kind = kind
    args.interleaved = interleaved
    cdef size_t elements = (args.heads + args.kv_heads) * 2 * half
    run(WORKERS, &args, tokens, ELEMENTS_PER_PIECE // (elements + 1) + 1, 0)
