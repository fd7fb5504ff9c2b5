"""Binding of the native attend; the contract is pace.reference.attend."""

import numpy as np

cimport numpy as cnp
from libc.stdint cimport int32_t
from libc.stdlib cimport free, malloc

from pace._kernels.runtime cimport check_type, check_vector, check_writeable, kind_of, pace_worker, run
from pace._kernels.store_kv.store_kv cimport check_kv_heads, kv_blocks, set_blocks

cnp.import_array()

cdef extern from "attend/attend.h":
    enum: ROWS_PER_ITEM
    struct attend_item:
        int32_t sequence
        int32_t head
        int32_t first_query
        int32_t num_queries
    struct attend_args:
        kv_blocks blocks
        const void *q
        size_t q_stride
        size_t group
        const int32_t *block_tables
        const int32_t *query_starts
        const int32_t *kv_lengths
        size_t table_stride
        float scale
        void *out
        const attend_item *items
    size_t attend_scratch_bytes(size_t rows, size_t head_dim) nogil
    void attend_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void attend_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [attend_avx2, attend_avx512]


cdef int check_batch(attend_args *args, Py_ssize_t tokens, Py_ssize_t sequences, Py_ssize_t num_blocks) except -1:
    cdef Py_ssize_t s, used, i, count, block_tokens = args.blocks.block_tokens
    cdef const int32_t *starts = args.query_starts
    if starts[0] != 0 or starts[sequences] != tokens:
        raise ValueError(f"query_starts is {starts[0]} … {starts[sequences]}; it must be 0 … {tokens}")
    for s in range(sequences):
        count = starts[s + 1] - starts[s]
        if count < 0 or args.kv_lengths[s] < count:
            raise ValueError(
                f"sequence {s} has {count} queries and {args.kv_lengths[s]} keys; its keys include the queries'"
            )
        used = (args.kv_lengths[s] + block_tokens - 1) // block_tokens
        if used > <Py_ssize_t>args.table_stride:
            raise ValueError(f"sequence {s} has {args.kv_lengths[s]} keys; its {args.table_stride} blocks hold fewer")
        for i in range(used):
            if not 0 <= args.block_tables[s * args.table_stride + i] < num_blocks:
                block = args.block_tables[s * args.table_stride + i]
                raise ValueError(f"sequence {s} names block {block}; there are {num_blocks}")
    return 0


cdef int queries_per_item(Py_ssize_t group) noexcept nogil:
    return max(1, ROWS_PER_ITEM // group)


cdef Py_ssize_t count_items(const attend_args *args, Py_ssize_t sequences) noexcept nogil:
    cdef Py_ssize_t s, count = 0, queries = queries_per_item(args.group)
    for s in range(sequences):
        count += (args.query_starts[s + 1] - args.query_starts[s] + queries - 1) // queries
    return count * args.blocks.kv_heads


cdef void list_items(const attend_args *args, Py_ssize_t sequences, attend_item *items) noexcept nogil:
    """Every sequence's queries in runs, each times every kv head; the last runs see most keys and come first."""
    cdef Py_ssize_t s, head, first, last, queries = queries_per_item(args.group), i = 0
    for s in range(sequences):
        last = args.query_starts[s + 1]
        while last > args.query_starts[s]:
            first = max(<Py_ssize_t>args.query_starts[s], last - queries)
            for head in range(<Py_ssize_t>args.blocks.kv_heads):
                items[i].sequence = s
                items[i].head = head
                items[i].first_query = first
                items[i].num_queries = last - first
                i += 1
            last = first


def attend(cnp.ndarray q not None, cnp.ndarray k_blocks not None, cnp.ndarray v_blocks not None,
           cnp.ndarray block_tables not None, cnp.ndarray query_starts not None, cnp.ndarray kv_lengths not None,
           float scale, cnp.ndarray out=None):
    cdef attend_args args
    cdef Py_ssize_t num_slots = set_blocks(&args.blocks, k_blocks, v_blocks)
    check_kv_heads(q, "q", &args.blocks, -1)
    cdef Py_ssize_t tokens = cnp.PyArray_DIM(q, 0), sequences = len(kv_lengths)
    check_vector(kv_lengths, "kv_lengths", sequences, cnp.NPY_INT32)
    check_vector(query_starts, "query_starts", sequences + 1, cnp.NPY_INT32)
    check_type(block_tables, "block_tables", cnp.NPY_INT32)
    if (cnp.PyArray_NDIM(block_tables) != 2 or cnp.PyArray_DIM(block_tables, 0) != sequences
            or not cnp.PyArray_IS_C_CONTIGUOUS(block_tables)):
        raise ValueError(
            f"block_tables has shape {np.shape(block_tables)}; it must be ({sequences}, blocks), contiguous"
        )
    args.q = cnp.PyArray_DATA(q)
    args.q_stride = cnp.PyArray_STRIDE(q, 0)
    args.group = cnp.PyArray_DIM(q, 1) // args.blocks.kv_heads
    args.block_tables = <const int32_t *>cnp.PyArray_DATA(block_tables)
    args.query_starts = <const int32_t *>cnp.PyArray_DATA(query_starts)
    args.kv_lengths = <const int32_t *>cnp.PyArray_DATA(kv_lengths)
    args.table_stride = cnp.PyArray_DIM(block_tables, 1)
    args.scale = scale
    check_batch(&args, tokens, sequences, num_slots // args.blocks.block_tokens)

    shape = np.shape(q)
    if out is None:
        out = np.empty(shape, q.dtype)
    elif (kind_of(out, "out") != args.blocks.kind or np.shape(out) != shape
            or not cnp.PyArray_IS_C_CONTIGUOUS(out)):
        raise ValueError(
            f"out has shape {np.shape(out)} and dtype {out.dtype}; it must be {shape}, {q.dtype}, contiguous"
        )
    check_writeable(out, "out")
    args.out = cnp.PyArray_DATA(out)
    cdef Py_ssize_t num_items = count_items(&args, sequences)
    cdef attend_item *items = <attend_item *>malloc(num_items * sizeof(attend_item) + 1)
    if items == NULL:
        raise MemoryError(f"no memory for {num_items} attention items")
    cdef size_t rows = queries_per_item(args.group) * args.group
    try:
        list_items(&args, sequences, items)
        args.items = items
        run(WORKERS, &args, num_items, 1, attend_scratch_bytes(rows, args.blocks.head_dim))
    finally:
        free(items)
    return out
