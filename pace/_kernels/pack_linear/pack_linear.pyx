"""Binding of the native pack_linear; the contract is pace.reference.pack_linear."""

from pace.reference.pack_linear import PackedLinear

cimport numpy as cnp

from pace._kernels.runtime cimport BF16, check_rows, check_writeable, kind_of, pace_worker, run

cnp.import_array()

cdef extern from "pack_linear/pack_linear.h":
    struct pack_linear_args:
        const void *weight
        size_t weight_stride
        size_t rows
        size_t columns
        int kind
        int panel_kind
        unsigned *panels
        size_t panel_step
        int *nan_found
    void pack_linear_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void pack_linear_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [pack_linear_avx2, pack_linear_avx512]


def pack_linear(cnp.ndarray weight not None, into=None, Py_ssize_t first_panel=0, Py_ssize_t panel_step=1):
    cdef pack_linear_args args
    args.kind = kind_of(weight, "weight")
    check_rows(weight, "weight", -1)
    cdef Py_ssize_t rows = cnp.PyArray_DIM(weight, 0), columns = cnp.PyArray_DIM(weight, 1)
    if into is None:
        into = PackedLinear.empty(rows, columns, weight.dtype)
    if columns != into.in_features:
        raise ValueError(f"weight has shape {(rows, columns)}; it must be (rows, {into.in_features})")
    cdef cnp.ndarray panels = into.panels
    check_writeable(panels, "into.panels")
    cdef Py_ssize_t count = (rows + 15) // 16, num_panels = cnp.PyArray_DIM(panels, 0)
    if first_panel < 0 or panel_step < 1 or (count and first_panel + (count - 1) * panel_step >= num_panels):
        raise ValueError(
            f"{count} panels from {first_panel} in steps of {panel_step} do not fit the {num_panels} there are"
        )
    args.weight = cnp.PyArray_DATA(weight)
    args.weight_stride = cnp.PyArray_STRIDE(weight, 0)
    args.rows = rows
    args.columns = columns
    args.panel_kind = kind_of(panels, "into")
    cdef size_t panel_words = 16 * ((columns + 1) // 2 if args.panel_kind == BF16 else columns)
    args.panels = <unsigned *>cnp.PyArray_DATA(panels) + first_panel * panel_words
    args.panel_step = panel_step * panel_words
    cdef int nan_found = 0
    args.nan_found = &nan_found
    run(WORKERS, &args, count, 1, 0)
    if nan_found:
        raise ValueError("weight holds NaN")
    return into
