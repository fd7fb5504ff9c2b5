#pragma once
#include <stddef.h>
#include <stdint.h>

// One layer's keys and values; the layout is drawn in pace/reference/store_kv.py.
struct kv_blocks {
    void *k, *v;
    ptrdiff_t k_strides[3], v_strides[3]; // bytes from one block, head, group of a head to the next
    size_t kv_heads, head_dim, block_tokens;
    int kind;
};

struct store_kv_args {
    struct kv_blocks blocks;
    const void *k, *v;
    size_t k_stride, v_stride; // bytes from one token to the next
    const int64_t *slots;
};

// Items are tokens.
void store_kv_avx2(const void *args, size_t begin, size_t end, void *scratch);
void store_kv_avx512(const void *args, size_t begin, size_t end, void *scratch);
