"""Binding of the native pack_experts; the contract is pace.reference.pack_experts."""

from pace._kernels.pack_linear.pack_linear import pack_linear
from pace.reference.pack_experts import MAX_SCALE, MXFP4, check_blocks

from libc.stdint cimport uint8_t
cimport numpy as cnp

from pace._kernels.runtime cimport check_writeable, pace_worker, run

cnp.import_array()

cdef extern from "pack_experts/pack_experts.h":
    struct pack_experts_args:
        const uint8_t *codes
        const uint8_t *scales
        size_t codes_stride
        size_t scales_stride
        size_t rows
        size_t blocks
        uint8_t *panels
        size_t panel_step
    void pack_experts_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void pack_experts_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [pack_experts_avx2, pack_experts_avx512]


def pack_experts(
    cnp.ndarray weight not None,
    into,
    Py_ssize_t expert,
    cnp.ndarray scales=None,
    Py_ssize_t first_panel=0,
    Py_ssize_t panel_step=1,
):
    cdef pack_experts_args args
    if not 0 <= expert < into.num_experts:
        raise ValueError(f"expert is {expert}; into has {into.num_experts}")
    if (scales is None) != (into.dtype != MXFP4):
        raise ValueError(f"into has dtype {into.dtype}: {'it takes' if scales is None else 'it takes no'} scales")
    if scales is None:
        pack_linear(weight, into.linear(expert), first_panel, panel_step)
        return into
    rows, blocks = check_blocks(weight, scales, into.in_features)
    cdef cnp.ndarray panels = into.panels
    check_writeable(panels, "into.panels")
    cdef Py_ssize_t count = (rows + 15) // 16, num_panels = cnp.PyArray_DIM(panels, 1)
    if first_panel < 0 or panel_step < 1 or (count and first_panel + (count - 1) * panel_step >= num_panels):
        raise ValueError(
            f"{count} panels from {first_panel} in steps of {panel_step} do not fit the {num_panels} there are"
        )
    highest = int(scales.max(initial=0))
    if highest > MAX_SCALE:
        raise ValueError(f"scales holds {highest}; it must be at most {MAX_SCALE} (255 is NaN)")
    args.codes = <const uint8_t *>cnp.PyArray_DATA(weight)
    args.scales = <const uint8_t *>cnp.PyArray_DATA(scales)
    args.codes_stride = cnp.PyArray_STRIDE(weight, 0)
    args.scales_stride = cnp.PyArray_STRIDE(scales, 0)
    args.rows = rows
    args.blocks = blocks
    cdef Py_ssize_t panel_bytes = cnp.PyArray_STRIDE(panels, 1)
    args.panels = <uint8_t *>cnp.PyArray_DATA(panels) + expert * cnp.PyArray_STRIDE(panels, 0) + first_panel * panel_bytes
    args.panel_step = panel_step * panel_bytes
    run(WORKERS, &args, count, 1, 0)
    return into
