# The blocks of one layer, as store_kv and attend take them.
cimport numpy as cnp

cdef extern from "store_kv/store_kv.h":
    struct kv_blocks:
        void *k
        void *v
        ptrdiff_t[3] k_strides
        ptrdiff_t[3] v_strides
        size_t kv_heads
        size_t head_dim
        size_t block_tokens
        int kind

# Fills `blocks`; returns how many slots there are.
cdef Py_ssize_t set_blocks(kv_blocks *blocks, cnp.ndarray k_blocks, cnp.ndarray v_blocks) except -1
# Checks (tokens, heads, head_dim) against the blocks; heads < 0 takes any positive multiple of kv_heads.
cdef int check_kv_heads(cnp.ndarray x, str name, const kv_blocks *blocks, Py_ssize_t heads) except -1
