"""Binding of the native embed; the contract is pace.reference.embed."""

cimport numpy as cnp
from libc.stdint cimport int32_t, uint32_t

from pace._kernels.runtime cimport check_vector, kind_of, output_rows, pace_worker, run

cnp.import_array()

cdef extern from "embed/embed.h":
    struct embed_args:
        const int32_t *tokens
        const uint32_t *panels
        size_t hidden
        void *out
        size_t out_stride
        float scale
        int kind
    void embed_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void embed_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [embed_avx2, embed_avx512]
cdef size_t TOKENS_PER_PIECE = 8


def embed(cnp.ndarray tokens not None, table, float scale=1.0, out=None):
    cdef embed_args args
    cdef Py_ssize_t count = len(tokens), i, vocabulary = table.out_features
    cdef cnp.ndarray panels = table.panels
    check_vector(tokens, "tokens", count, cnp.NPY_INT32)
    if table.gated:
        raise ValueError("table is gated; it must be a plain weight")
    args.tokens = <const int32_t *>cnp.PyArray_DATA(tokens)
    for i in range(count):
        if not 0 <= args.tokens[i] < vocabulary:
            raise ValueError(f"token {args.tokens[i]} is outside the vocabulary of {vocabulary}")
    args.kind = kind_of(panels, "table")
    args.panels = <const uint32_t *>cnp.PyArray_DATA(panels)
    args.hidden = table.in_features
    args.scale = scale
    cdef cnp.ndarray result = output_rows(out, count, args.hidden, args.kind)
    args.out = cnp.PyArray_DATA(result)
    args.out_stride = cnp.PyArray_STRIDE(result, 0)
    run(WORKERS, &args, count, TOKENS_PER_PIECE, 0)
    return result
