#pragma once
#include <stddef.h>
#include <stdint.h>

struct embed_args {
    const int32_t *tokens;
    const uint32_t *panels;
    size_t hidden;
    void *out;
    size_t out_stride; // bytes from one row to the next
    float scale;
    int kind;
};

// Items are tokens.
void embed_avx2(const void *args, size_t begin, size_t end, void *scratch);
void embed_avx512(const void *args, size_t begin, size_t end, void *scratch);
