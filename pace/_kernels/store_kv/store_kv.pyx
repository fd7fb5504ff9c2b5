"""Binding of the native store_kv; the contract is pace.reference.store_kv."""

import numpy as np

cimport numpy as cnp
from libc.stdint cimport int64_t

from pace._kernels.runtime cimport BF16, check_vector, check_writeable, kind_of, pace_worker, run

cnp.import_array()

cdef extern from "store_kv/store_kv.h":
    struct store_kv_args:
        kv_blocks blocks
        const void *k
        const void *v
        size_t k_stride
        size_t v_stride
        const int64_t *slots
    void store_kv_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void store_kv_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [store_kv_avx2, store_kv_avx512]
cdef size_t TOKENS_PER_PIECE = 16
cdef Py_ssize_t GROUP = 16


cdef Py_ssize_t set_blocks(kv_blocks *blocks, cnp.ndarray k_blocks, cnp.ndarray v_blocks) except -1:
    cdef int kind = kind_of(k_blocks, "k_blocks")
    if kind_of(v_blocks, "v_blocks") != kind:
        raise TypeError(f"v_blocks has dtype {v_blocks.dtype}; it must be {k_blocks.dtype}, as k_blocks")
    cdef int ndim = 6 if kind == BF16 else 5
    cdef cnp.npy_intp *k = cnp.PyArray_DIMS(k_blocks)
    cdef cnp.npy_intp *v = cnp.PyArray_DIMS(v_blocks)
    cdef Py_ssize_t head_dim = 0
    cdef bint fits = cnp.PyArray_NDIM(k_blocks) == ndim and cnp.PyArray_NDIM(v_blocks) == ndim
    if fits:
        head_dim = k[3] * (2 if kind == BF16 else 1)
        fits = k[0] == v[0] and k[1] == v[1] and k[2] == v[2] and v[4] == head_dim
        fits = fits and k[1] > 0 and k[2] > 0 and head_dim > 0 and head_dim % 2 == 0
        if kind == BF16:
            fits = fits and k[4] == GROUP and k[5] == 2 and v[3] == GROUP // 2 and v[5] == 2
        else:
            fits = fits and k[4] == GROUP and v[3] == GROUP
    if not fits:
        raise ValueError(f"k_blocks has shape {np.shape(k_blocks)}, v_blocks {np.shape(v_blocks)}; see kv_shapes")
    copy_strides(blocks.k_strides, k_blocks, "k_blocks")
    copy_strides(blocks.v_strides, v_blocks, "v_blocks")
    blocks.k = cnp.PyArray_DATA(k_blocks)
    blocks.v = cnp.PyArray_DATA(v_blocks)
    blocks.kv_heads = k[1]
    blocks.head_dim = head_dim
    blocks.block_tokens = k[2] * GROUP
    blocks.kind = kind
    return k[0] * k[2] * GROUP


cdef int copy_strides(ptrdiff_t *strides, cnp.ndarray blocks, str name) except -1:
    """Those of blocks, heads and groups; within a group there is only one way."""
    cdef Py_ssize_t axis, dense = cnp.PyArray_ITEMSIZE(blocks)
    for axis in range(cnp.PyArray_NDIM(blocks) - 1, 2, -1):
        if cnp.PyArray_DIM(blocks, axis) > 1 and cnp.PyArray_STRIDE(blocks, axis) != dense:
            raise ValueError(
                f"{name} has strides {(<object>blocks).strides}; each group of {GROUP} tokens must be contiguous"
            )
        dense *= cnp.PyArray_DIM(blocks, axis)
    for axis in range(3):
        strides[axis] = cnp.PyArray_STRIDE(blocks, axis)
        if cnp.PyArray_DIM(blocks, axis) > 1 and strides[axis] % 4:
            raise ValueError(
                f"{name} has strides {(<object>blocks).strides}; those of groups must be multiples of 4 bytes"
            )
    return 0


cdef int check_kv_heads(cnp.ndarray x, str name, const kv_blocks *blocks, Py_ssize_t heads) except -1:
    cdef Py_ssize_t kv_heads = blocks.kv_heads, head_dim = blocks.head_dim, count
    if kind_of(x, name) != blocks.kind:
        wanted = "bfloat16" if blocks.kind == BF16 else "float32"
        raise TypeError(f"{name} has dtype {x.dtype}; it must be {wanted}, as k_blocks")
    cdef bint fits = cnp.PyArray_NDIM(x) == 3 and cnp.PyArray_DIM(x, 2) == head_dim
    if fits:
        count = cnp.PyArray_DIM(x, 1)
        fits = count > 0 and count % kv_heads == 0 if heads < 0 else count == heads
    if not fits:
        wanted = f"a positive multiple of {kv_heads}" if heads < 0 else heads
        raise ValueError(f"{name} has shape {np.shape(x)}; it must be (tokens, {wanted}, {head_dim})")
    cdef Py_ssize_t size = cnp.PyArray_ITEMSIZE(x)
    if cnp.PyArray_SIZE(x) and (cnp.PyArray_STRIDE(x, 2) != size or cnp.PyArray_STRIDE(x, 1) != size * head_dim):
        raise ValueError(f"{name} has strides {(<object>x).strides}; the heads of a token must be contiguous")
    return 0


def store_kv(cnp.ndarray k not None, cnp.ndarray v not None, cnp.ndarray k_blocks not None,
             cnp.ndarray v_blocks not None, cnp.ndarray slots not None):
    cdef store_kv_args args
    cdef Py_ssize_t num_slots = set_blocks(&args.blocks, k_blocks, v_blocks), i
    check_writeable(k_blocks, "k_blocks")
    check_writeable(v_blocks, "v_blocks")
    check_kv_heads(k, "k", &args.blocks, args.blocks.kv_heads)
    check_kv_heads(v, "v", &args.blocks, args.blocks.kv_heads)
    cdef Py_ssize_t tokens = cnp.PyArray_DIM(k, 0)
    if cnp.PyArray_DIM(v, 0) != tokens:
        raise ValueError(f"v has shape {np.shape(v)}; it must be {np.shape(k)}, as k")
    check_vector(slots, "slots", tokens, cnp.NPY_INT64)
    args.slots = <const int64_t *>cnp.PyArray_DATA(slots)
    for i in range(tokens):
        if not 0 <= args.slots[i] < num_slots:
            raise ValueError(f"slot {args.slots[i]} is outside the {num_slots} there are")
    args.k = cnp.PyArray_DATA(k)
    args.v = cnp.PyArray_DATA(v)
    args.k_stride = cnp.PyArray_STRIDE(k, 0)
    args.v_stride = cnp.PyArray_STRIDE(v, 0)
    run(WORKERS, &args, tokens, TOKENS_PER_PIECE, 0)
