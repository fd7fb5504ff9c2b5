"""Binding of the native moe; the contract is pace.reference.moe."""

import numpy as np

from pace.reference.moe import check_experts

from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
cimport numpy as cnp

from pace._kernels.runtime cimport check_rows, check_type, kind_of, output_rows, pace_worker, run

cnp.import_array()

cdef extern from "moe/moe.h":
    enum: ITEM_PANELS
    enum: ROWS_PER_UNIT
    enum: MOE_UNPACKED_WORDS
    enum: MOE_SUMS
    struct moe_unit:
        size_t expert
        size_t first
        size_t rows
    struct moe_weight:
        const void *panels
        size_t panel_bytes
        size_t num_panels
        size_t in_features
        size_t out_features
        int is_mxfp4
        const float *bias
    struct moe_args:
        const void *x
        size_t x_stride
        int kind
        size_t tokens
        size_t k
        const uint32_t *places
        const moe_unit *units
        moe_weight gate_up
        moe_weight down
        float alpha
        float limit
        uint32_t *a
        uint32_t *inner
        float *answers
        const float *weights
        size_t weights_stride
        void *out
        size_t out_stride
    void moe_arrange_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void moe_arrange_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void moe_gate_up_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void moe_gate_up_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void moe_down_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void moe_down_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void moe_combine_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void moe_combine_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] ARRANGE = [moe_arrange_avx2, moe_arrange_avx512]
cdef pace_worker[2] GATE_UP = [moe_gate_up_avx2, moe_gate_up_avx512]
cdef pace_worker[2] DOWN = [moe_down_avx2, moe_down_avx512]
cdef pace_worker[2] COMBINE = [moe_combine_avx2, moe_combine_avx512]

# Tokens whose intermediate results are there at once; by then an expert's weights are read for more rows than a unit has.
cdef size_t TOKENS_PER_PASS = 1024


cdef int set_weight(moe_weight *to, object experts, cnp.ndarray bias, str name, Py_ssize_t features) except -1:
    cdef cnp.ndarray panels = experts.panels
    memset(to, 0, sizeof(moe_weight))
    to.panels = cnp.PyArray_DATA(panels)
    to.num_panels = cnp.PyArray_DIM(panels, 1)
    to.panel_bytes = cnp.PyArray_STRIDE(panels, 1)
    to.in_features = experts.in_features
    to.out_features = experts.out_features
    to.is_mxfp4 = cnp.PyArray_TYPE(panels) == cnp.NPY_UINT8
    if bias is None:
        return 0
    check_type(bias, name, cnp.NPY_FLOAT32)
    cdef Py_ssize_t num_experts = cnp.PyArray_DIM(panels, 0)
    if cnp.PyArray_NDIM(bias) != 2 or cnp.PyArray_DIM(bias, 0) != num_experts or cnp.PyArray_DIM(bias, 1) != features:
        raise ValueError(f"{name} has shape {np.shape(bias)}; it must be {(num_experts, features)}")
    if not cnp.PyArray_IS_C_CONTIGUOUS(bias):
        raise ValueError(f"{name} has strides {(<object>bias).strides}; it must be contiguous")
    to.bias = <const float *>cnp.PyArray_DATA(bias)
    return 0


cdef int check_choice(cnp.ndarray array, str name, int typenum, Py_ssize_t tokens, Py_ssize_t k) except -1:
    check_type(array, name, typenum)
    check_rows(array, name, -1)
    if cnp.PyArray_DIM(array, 0) != tokens or cnp.PyArray_DIM(array, 1) != k:
        raise ValueError(f"{name} has shape {np.shape(array)}; it must be {(tokens, k)}")
    return 0


cdef int check_chosen(cnp.ndarray chosen, Py_ssize_t num_experts) except -1:
    if cnp.PyArray_SIZE(chosen):
        lowest, highest = chosen.min(), chosen.max()
        if not (0 <= lowest and highest < num_experts):
            raise ValueError(f"chosen holds expert {lowest if lowest < 0 else highest}; there are {num_experts}")
    return 0


cdef size_t sort_places(
    const char *chosen, Py_ssize_t stride, size_t tokens, size_t k, size_t num_experts, size_t *ends, uint32_t *places,
    moe_unit *units
) noexcept nogil:
    """By expert, then token; returns how many units there are. ends: room for num_experts."""
    cdef size_t token, rank, expert, first = 0, count = 0, end
    memset(ends, 0, num_experts * sizeof(size_t))
    for token in range(tokens):
        for rank in range(k):
            ends[(<const int32_t *>(chosen + token * stride))[rank]] += 1
    for expert in range(num_experts):
        end = first + ends[expert]
        ends[expert] = first
        while first < end:
            units[count] = moe_unit(expert, first, min(end - first, <size_t>ROWS_PER_UNIT))
            first += units[count].rows
            count += 1
    for token in range(tokens):
        for rank in range(k):
            expert = (<const int32_t *>(chosen + token * stride))[rank]
            places[ends[expert]] = token * k + rank
            ends[expert] += 1
    return count


cdef int run_pass(moe_args *args, const char *chosen, Py_ssize_t stride, size_t num_experts) except -1:
    cdef size_t places = args.tokens * args.k
    cdef size_t inner = args.gate_up.out_features, hidden = args.gate_up.in_features, num_units
    # Four bytes an element is the most that any rung wants; a pair of bfloat16 may be two float32.
    cdef size_t words = places * (hidden + 1 + inner + 1 + hidden + 1)
    cdef size_t most_units = places // ROWS_PER_UNIT + min(places, num_experts)
    cdef char *memory = <char *>malloc(
        4 * (words + places) + most_units * sizeof(moe_unit) + num_experts * sizeof(size_t) + 64
    )
    if memory == NULL:
        raise MemoryError(f"no memory for {places} rows of {inner} and {hidden} features")
    cdef moe_unit *units = <moe_unit *>memory
    cdef size_t *ends = <size_t *>(units + most_units)
    cdef uint32_t *at = <uint32_t *>(ends + num_experts)
    args.units = units
    args.places = at
    args.a = at + places
    args.inner = args.a + places * (hidden + 1)
    args.answers = <float *>(args.inner + places * (inner + 1))
    cdef size_t scratch = 4 * (MOE_SUMS + MOE_UNPACKED_WORDS)
    try:
        num_units = sort_places(chosen, stride, args.tokens, args.k, num_experts, ends, at, units)
        run(ARRANGE, args, num_units, 1, 0)
        run(GATE_UP, args, num_units * ((args.gate_up.num_panels + ITEM_PANELS - 1) // ITEM_PANELS), 1, scratch)
        run(DOWN, args, num_units * ((args.down.num_panels + ITEM_PANELS - 1) // ITEM_PANELS), 1, scratch)
        run(COMBINE, args, args.tokens, 8, 0)
    finally:
        free(memory)
    return 0


def moe(
    cnp.ndarray x not None,
    gate_up,
    down,
    cnp.ndarray chosen not None,
    cnp.ndarray weights not None,
    cnp.ndarray gate_up_bias=None,
    cnp.ndarray down_bias=None,
    float alpha=1.702,
    float limit=7.0,
    out=None,
):
    cdef moe_args args
    args.kind = kind_of(x, "x")
    check_experts(x, gate_up, down, limit)
    cdef Py_ssize_t hidden = gate_up.in_features, inner = gate_up.out_features, num_experts = gate_up.num_experts
    check_rows(x, "x", hidden)
    cdef Py_ssize_t tokens = cnp.PyArray_DIM(x, 0)
    check_type(chosen, "chosen", cnp.NPY_INT32)
    check_rows(chosen, "chosen", -1)
    cdef Py_ssize_t k = cnp.PyArray_DIM(chosen, 1)
    check_choice(chosen, "chosen", cnp.NPY_INT32, tokens, k)
    check_choice(weights, "weights", cnp.NPY_FLOAT32, tokens, k)
    check_chosen(chosen, num_experts)
    set_weight(&args.gate_up, gate_up, gate_up_bias, "gate_up_bias", 2 * inner)
    set_weight(&args.down, down, down_bias, "down_bias", hidden)
    args.k = k
    args.alpha = alpha
    args.limit = limit
    args.x_stride = cnp.PyArray_STRIDE(x, 0)
    args.weights_stride = cnp.PyArray_STRIDE(weights, 0)
    cdef cnp.ndarray result = output_rows(out, tokens, hidden, args.kind)
    args.out_stride = cnp.PyArray_STRIDE(result, 0)
    cdef size_t begin, left
    for begin in range(0, tokens, TOKENS_PER_PASS):
        left = tokens - begin
        args.tokens = min(left, TOKENS_PER_PASS)
        args.x = <char *>cnp.PyArray_DATA(x) + begin * args.x_stride
        args.weights = <float *>(<char *>cnp.PyArray_DATA(weights) + begin * args.weights_stride)
        args.out = <char *>cnp.PyArray_DATA(result) + begin * args.out_stride
        run_pass(
            &args,
            <char *>cnp.PyArray_DATA(chosen) + begin * cnp.PyArray_STRIDE(chosen, 0),
            cnp.PyArray_STRIDE(chosen, 0),
            num_experts,
        )
    return result
