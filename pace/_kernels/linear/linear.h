#pragma once
#include <stddef.h>
#include <stdint.h>

#include "linear/brgemm.h"

struct linear_args {
    const void *x;
    size_t x_stride; // strides are in bytes from one row to the next
    uint32_t *a;     // x again, as the tiles want it: (rows / TILE_ROWS) tiles of (words, rows of the tile)
    const uint32_t *panels;
    size_t num_panels;
    size_t rows, in_features, out_features;
    int kind;                    // of x and of the panels
    const struct brgemm *brgemm; // in place of our tiles, where there is one: takes x as it is

    const float *bias;
    int activation;
    const void *multiply, *residual; // of out's dtype
    size_t multiply_stride, residual_stride;
    void *out;
    size_t out_stride;
    int out_kind;
};

// Items are rows: lays x out in a.
void linear_arrange_avx2(const void *args, size_t begin, size_t end, void *scratch);
void linear_arrange_avx512(const void *args, size_t begin, size_t end, void *scratch);
// Items are blocks of rows times pairs of panels.
void linear_avx2(const void *args, size_t begin, size_t end, void *scratch);
void linear_avx512(const void *args, size_t begin, size_t end, void *scratch);
// As linear, the panels of a pair being gate and up.
void gated_mlp_avx2(const void *args, size_t begin, size_t end, void *scratch);
void gated_mlp_avx512(const void *args, size_t begin, size_t end, void *scratch);

// Rows of one item, a multiple of every rung's tile. All panels pass over a block before the next one's turn: the block
// stays in the L3 cache, and weights are read once for so many rows.
enum { ROWS_PER_BLOCK = 120 };
