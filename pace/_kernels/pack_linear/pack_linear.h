#pragma once
#include <stddef.h>
#include <stdint.h>

struct pack_linear_args {
    const void *weight;
    size_t weight_stride; // bytes from one row to the next
    size_t rows, columns;
    int kind;          // of weight
    int panel_kind;    // of the panels
    uint32_t *panels;  // where the first 16 rows go
    size_t panel_step; // words from there to where the next 16 go
    int *nan_found;    // set to 1 where a weight is NaN
};

// Items are panels.
void pack_linear_avx2(const void *args, size_t begin, size_t end, void *scratch);
void pack_linear_avx512(const void *args, size_t begin, size_t end, void *scratch);
