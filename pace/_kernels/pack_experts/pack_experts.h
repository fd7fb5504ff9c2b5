#pragma once
#include <stddef.h>
#include <stdint.h>

struct pack_experts_args {
    const uint8_t *codes, *scales;
    size_t codes_stride, scales_stride; // bytes from one row to the next
    size_t rows, blocks;                // blocks of 32 k in a row
    uint8_t *panels;                    // where the first 16 rows go
    size_t panel_step;                  // bytes from there to where the next 16 go
};

// Items are panels.
void pack_experts_avx2(const void *args, size_t begin, size_t end, void *scratch);
void pack_experts_avx512(const void *args, size_t begin, size_t end, void *scratch);
