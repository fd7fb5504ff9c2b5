#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct rope_args {
    void *q, *k;
    const float *cos, *sin; // (positions, half)
    const int32_t *positions;
    size_t heads, kv_heads, head_dim;
    size_t half;               // rotary_dim / 2
    size_t q_stride, k_stride; // bytes from one token to the next
    int kind;                  // of q and k
    bool interleaved;
};

void rope_avx2(const void *args, size_t begin, size_t end, void *scratch);
void rope_avx512(const void *args, size_t begin, size_t end, void *scratch);
