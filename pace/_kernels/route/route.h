#pragma once
#include <stddef.h>
#include <stdint.h>

struct route_args {
    const float *logits;
    size_t logits_stride; // bytes from one row to the next
    size_t experts, k;
    int32_t *chosen; // (tokens, k)
    float *weights;  // (tokens, k)
};

// Items are tokens.
void route_avx2(const void *args, size_t begin, size_t end, void *scratch);
void route_avx512(const void *args, size_t begin, size_t end, void *scratch);
