"""Binding of the native attend; the contract is pace.reference.attend."""

from operator import index

import numpy as np

cimport numpy as cnp
from libc.stdint cimport INT32_MAX, SIZE_MAX, int32_t, int64_t
from libc.stdlib cimport free, malloc, qsort

from pace._kernels.runtime cimport check_type, check_vector, check_writeable, kind_of, num_threads, pace_worker, run
from pace._kernels.store_kv.store_kv cimport check_kv_heads, kv_blocks, set_blocks

cnp.import_array()

cdef extern from "attend/attend.h":
    enum: SPLIT
    struct attend_item:
        int32_t sequence
        int32_t head
        int32_t first_query
        int32_t num_queries
        int32_t begin_split
        int32_t end_split
        int32_t first_split
        int32_t num_splits
        int32_t *unfinished
        float *partials
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
        size_t window
        float softcap
        const float *sinks
        const int32_t *spans
        void *out
        const attend_item *items
    size_t attend_state_floats(size_t rows, size_t head_dim) nogil
    size_t attend_scratch_bytes(size_t rows, size_t head_dim) nogil
    void attend_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void attend_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [attend_avx2, attend_avx512]

# How the work is cut; no choice here changes a bit of the result.
cdef Py_ssize_t MOST_QUERIES = 64  # of an item: K and V come from memory once for all of them
cdef Py_ssize_t FEWEST_ROWS = 48  # of an item, if there are: with fewer, K and V are read more often than used
cdef Py_ssize_t ITEMS_PER_THREAD = 4  # so that the last to end is not far behind
cdef Py_ssize_t MOST_PARTIAL_FLOATS = 16 << 20  # that divided runs leave to be merged, all together; others stay whole


cdef struct Run:
    # Queries of one sequence, the splits of the keys that they see, and what a kv head of it costs: rows times keys.
    Py_ssize_t sequence
    Py_ssize_t first_query
    Py_ssize_t num_queries
    Py_ssize_t first_split
    Py_ssize_t num_splits
    Py_ssize_t pieces
    int64_t cost


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


cdef int check_what_is_seen(attend_args *args, Py_ssize_t tokens, Py_ssize_t sequences, window, sinks, softcap,
                            spans) except -1:
    cdef Py_ssize_t s, token, own
    cdef int32_t begin, end, length
    args.window = SIZE_MAX
    if window is not None:
        window = index(window)
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1, or None")
        args.window = min(window, INT32_MAX)
    args.softcap = 0
    if softcap is not None:
        if not 2.0**-64 <= softcap <= 2.0**64:
            raise ValueError(f"softcap is {softcap}; it must be 2^-64 to 2^64, or None")
        args.softcap = softcap
    args.sinks = NULL
    if sinks is not None:
        check_vector(sinks, "sinks", args.group * args.blocks.kv_heads, cnp.NPY_FLOAT32)
        args.sinks = <const float *>cnp.PyArray_DATA(sinks)
    args.spans = NULL
    if spans is None:
        return 0
    check_type(spans, "spans", cnp.NPY_INT32)
    if np.shape(spans) != (tokens, 2) or not cnp.PyArray_IS_C_CONTIGUOUS(spans):
        raise ValueError(f"spans has shape {np.shape(spans)}; it must be ({tokens}, 2), contiguous")
    args.spans = <const int32_t *>cnp.PyArray_DATA(spans)
    for s in range(sequences):
        length = args.kv_lengths[s]
        for token in range(args.query_starts[s], args.query_starts[s + 1]):
            begin, end, own = args.spans[2 * token], args.spans[2 * token + 1], length - args.query_starts[s + 1] + token
            if begin != end and not 0 <= begin <= own < end <= length:
                raise ValueError(
                    f"token {token}, at position {own} of {length}, has the span {begin} … {end}; "
                    "it must hold the token and lie within its sequence's keys"
                )
    return 0


cdef Py_ssize_t queries_per_item(const attend_args *args, Py_ssize_t tokens) noexcept nogil:
    """As many as there can be while every thread has several items."""
    cdef Py_ssize_t items = num_threads() * ITEMS_PER_THREAD
    cdef Py_ssize_t fewest = max(1, FEWEST_ROWS // <Py_ssize_t>args.group)
    return min(max(tokens * <Py_ssize_t>args.blocks.kv_heads // items, fewest), max(MOST_QUERIES, fewest))


cdef Run run_of(const attend_args *args, Py_ssize_t sequence, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef Run r
    cdef Py_ssize_t length = args.kv_lengths[sequence], token
    cdef Py_ssize_t position = length - args.query_starts[sequence + 1] + first
    cdef Py_ssize_t begin = 0, end = position + last - first
    if <size_t>(position + 1) > args.window:
        begin = position + 1 - <Py_ssize_t>args.window
    if args.spans != NULL:
        for token in range(first, last):
            if args.spans[2 * token] < args.spans[2 * token + 1]:
                begin = min(begin, <Py_ssize_t>args.spans[2 * token])
                end = max(end, <Py_ssize_t>args.spans[2 * token + 1])
    r.sequence, r.first_query, r.num_queries = sequence, first, last - first
    r.first_split = begin // SPLIT
    r.num_splits = (end + SPLIT - 1) // SPLIT - r.first_split
    r.cost = (last - first) * <Py_ssize_t>args.group * (end - begin)
    r.pieces = 1  # until `divide`
    return r


cdef int more_costly(const void *a, const void *b) noexcept nogil:
    cdef int64_t left = (<const Run *>a).cost, right = (<const Run *>b).cost
    return (left < right) - (left > right)


cdef Py_ssize_t list_runs(const attend_args *args, Py_ssize_t sequences, Py_ssize_t queries, Run *runs) noexcept nogil:
    """Every sequence's new tokens in runs of so many queries; returns how many. NULL only counts."""
    cdef Py_ssize_t s, first, count = 0
    for s in range(sequences):
        first = args.query_starts[s]
        while first < args.query_starts[s + 1]:
            if runs != NULL:
                runs[count] = run_of(args, s, first, min(first + queries, <Py_ssize_t>args.query_starts[s + 1]))
            first += queries
            count += 1
    return count


cdef Py_ssize_t partial_floats(const attend_args *args, const Run *r) noexcept nogil:
    """What the pieces of a run leave to be merged, of a head."""
    return r.num_splits * attend_state_floats(r.num_queries * args.group, args.blocks.head_dim)


cdef Py_ssize_t divide(const attend_args *args, Run *runs, Py_ssize_t num_runs) noexcept nogil:
    """Cut the keys of runs that cost far more than a thread's share; returns the floats that all leave."""
    cdef Py_ssize_t i, more, floats = 0, heads = args.blocks.kv_heads
    cdef int64_t fair_cost = 0
    for i in range(num_runs):
        fair_cost += runs[i].cost * heads
    fair_cost = fair_cost // (num_threads() * ITEMS_PER_THREAD) + 1
    for i in range(num_runs):
        runs[i].pieces = max(1, min(runs[i].num_splits, runs[i].cost // fair_cost))
        more = heads * partial_floats(args, &runs[i])
        if num_threads() == 1 or floats + more > MOST_PARTIAL_FLOATS:
            runs[i].pieces = 1
        if runs[i].pieces > 1:
            floats += more
    return floats


cdef void list_items(const attend_args *args, const Run *runs, Py_ssize_t num_runs, attend_item *items,
                     int32_t *unfinished, float *partials) noexcept nogil:
    cdef Py_ssize_t i, head, piece, pieces, count = 0, shared = 0
    cdef attend_item *item
    cdef const Run *r
    for i in range(num_runs):
        r = &runs[i]
        pieces = r.pieces
        for head in range(<Py_ssize_t>args.blocks.kv_heads):
            for piece in range(pieces):
                item = &items[count]
                item.sequence, item.head = r.sequence, head
                item.first_query, item.num_queries = r.first_query, r.num_queries
                item.first_split = r.first_split
                item.begin_split = r.first_split + r.num_splits * piece // pieces
                item.end_split = r.first_split + r.num_splits * (piece + 1) // pieces
                item.num_splits = r.num_splits if pieces > 1 else 0
                item.unfinished, item.partials = &unfinished[shared], partials
                count += 1
            if pieces > 1:
                unfinished[shared] = pieces
                shared += 1
                partials += partial_floats(args, r)


cdef int attend_runs(attend_args *args, Run *runs, Py_ssize_t num_runs, Py_ssize_t queries) except -1:
    cdef Py_ssize_t i, num_items = 0, num_shared = 0, heads = args.blocks.kv_heads
    qsort(runs, num_runs, sizeof(Run), more_costly)
    cdef Py_ssize_t num_floats = divide(args, runs, num_runs)
    for i in range(num_runs):
        num_items += heads * runs[i].pieces
        num_shared += heads if runs[i].pieces > 1 else 0
    cdef size_t item_bytes = num_items * sizeof(attend_item)
    cdef char *memory = <char *>malloc(item_bytes + num_shared * sizeof(int32_t) + 1)
    cdef float *partials = <float *>malloc(num_floats * sizeof(float) + 1)
    try:
        if memory == NULL or partials == NULL:
            raise MemoryError(f"no memory for {num_items} attention items and {num_floats} partial sums")
        args.items = <attend_item *>memory
        list_items(args, runs, num_runs, <attend_item *>memory, <int32_t *>(memory + item_bytes), partials)
        run(WORKERS, args, num_items, 1, attend_scratch_bytes(queries * args.group, args.blocks.head_dim), False)
    finally:
        free(memory)
        free(partials)
    return 0


def attend(cnp.ndarray q not None, cnp.ndarray k_blocks not None, cnp.ndarray v_blocks not None,
           cnp.ndarray block_tables not None, cnp.ndarray query_starts not None, cnp.ndarray kv_lengths not None,
           float scale, window=None, cnp.ndarray sinks=None, softcap=None, cnp.ndarray spans=None,
           cnp.ndarray out=None):
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
    check_what_is_seen(&args, tokens, sequences, window, sinks, softcap, spans)

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
    cdef Py_ssize_t queries = queries_per_item(&args, tokens)
    cdef Py_ssize_t num_runs = list_runs(&args, sequences, queries, NULL)
    cdef Run *runs = <Run *>malloc(num_runs * sizeof(Run) + 1)
    if runs == NULL:
        raise MemoryError(f"no memory for {num_runs} attention runs")
    try:
        list_runs(&args, sequences, queries, runs)
        attend_runs(&args, runs, num_runs, queries)
    finally:
        free(runs)
    return out
