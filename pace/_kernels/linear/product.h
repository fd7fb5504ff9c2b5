// The product of rows and packed panels that linear and gated_mlp share; they differ in what becomes of its
// sums.
#pragma once
#include "linear/linear.h"
#include "simd/activation.h"
#include "simd/tile.h"

enum { PAIR_COLUMNS = 32 };

// sums (rows, 32) of one tile of rows and the panels 2·pair and 2·pair + 1.
INLINE void sum_pair(enum kind kind, const struct linear_args *a, size_t first_row, size_t rows, size_t pair,
                     float *sums) {
    const size_t words = words_of(kind, a->in_features), a_words = a_words_of(kind, a->in_features);
    const size_t panels = a->num_panels - 2 * pair < 2 ? 1 : 2;
    struct tile t = {
        .a = a->a + first_row * a_words,
        .a_step = rows,
        .a_row = 1,
        .b = a->panels + 2 * pair * words * 16,
        .b_step = 16,
        .b_panel = words * 16,
        .num_words = words,
        .ahead = WEIGHTS_AHEAD / TILE_PANELS,
    };
    if (TILE_PANELS == 2 && panels == 2) {
        sum_tile(kind, true, true, rows, TILE_PANELS, &t, sums, PAIR_COLUMNS);
        return;
    }
    for (size_t p = 0; p < panels; p++, t.b += t.b_panel)
        sum_tile(kind, true, true, rows, 1, &t, sums + 16 * p, PAIR_COLUMNS);
}

// sums (64) of the only row and up to four panels. A row at decode is bound by memory.
INLINE void sum_one_row(enum kind kind, const struct linear_args *a, size_t pair, size_t panels, float *sums) {
    const size_t words = words_of(kind, a->in_features);
    struct tile t = {
        .a = a->a,
        .a_step = 1,
        .b = a->panels + 2 * pair * words * 16,
        .b_step = 16,
        .b_panel = words * 16,
        .num_words = words,
        .ahead = WEIGHTS_AHEAD / ONE_ROW_PANELS,
    };
    if (panels == ONE_ROW_PANELS) {
        sum_tile_of(kind, true, true, 1, ONE_ROW_PANELS, &t, sums, 0);
        return;
    }
    for (size_t p = 0; p < panels; p++, t.b += t.b_panel) sum_tile_of(kind, true, true, 1, 1, &t, sums + 16 * p, 0);
}

typedef void finish_row(const struct linear_args *a, size_t row, size_t pair, const float *sums);

INLINE void product_of_one_row(const struct linear_args *a, size_t begin, size_t end, finish_row *finish) {
    float sums[ONE_ROW_PANELS * 16] __attribute__((aligned(64)));
    for (size_t pair = begin; pair < end; pair += 2) {
        const size_t wanted = pair + 1 < end ? 4 : 2, left = a->num_panels - 2 * pair;
        const size_t panels = left < wanted ? left : wanted;
        if (a->kind == BF16)
            sum_one_row(BF16, a, pair, panels, sums);
        else
            sum_one_row(F32, a, pair, panels, sums);
        finish(a, 0, pair, sums);
        if (panels > 2) finish(a, 0, pair + 1, sums + PAIR_COLUMNS);
    }
}

INLINE void product_by_brgemm(const struct linear_args *a, size_t begin, size_t end, finish_row *finish) {
    const size_t pairs = (a->num_panels + 1) / 2, words = words_of(a->kind, a->in_features);
    float sums[ROWS_PER_BLOCK * PAIR_COLUMNS] __attribute__((aligned(64)));
    for (size_t item = begin; item < end; item++) {
        const size_t pair = item % pairs, first = item / pairs * ROWS_PER_BLOCK, left = a->rows - first;
        const size_t rows = left < ROWS_PER_BLOCK ? left : ROWS_PER_BLOCK;
        for (size_t p = 0; p < 2 && 2 * pair + p < a->num_panels; p++)
            brgemm(a->brgemm, rows == ROWS_PER_BLOCK, a->panels + (2 * pair + p) * words * 16,
                   (const char *)a->x + first * a->x_stride, sums + 16 * p);
        for (size_t r = 0; r < rows; r++) finish(a, first + r, pair, sums + r * PAIR_COLUMNS);
    }
}

INLINE void product(const struct linear_args *a, size_t begin, size_t end, finish_row *finish) {
    if (a->brgemm) {
        product_by_brgemm(a, begin, end, finish);
        return;
    }
    if (a->rows == 1) {
        product_of_one_row(a, begin, end, finish);
        return;
    }
    const size_t pairs = (a->num_panels + 1) / 2;
    float sums[TILE_ROWS * PAIR_COLUMNS] __attribute__((aligned(64)));
    for (size_t item = begin; item < end; item++) {
        const size_t pair = item % pairs, block_begin = item / pairs * ROWS_PER_BLOCK;
        const size_t left = a->rows - block_begin;
        const size_t block_end = block_begin + (left < ROWS_PER_BLOCK ? left : ROWS_PER_BLOCK);
        for (size_t row = block_begin; row < block_end; row += TILE_ROWS) {
            const size_t rows = block_end - row < TILE_ROWS ? block_end - row : TILE_ROWS;
            if (a->kind == BF16)
                sum_pair(BF16, a, row, rows, pair, sums);
            else
                sum_pair(F32, a, row, rows, pair, sums);
            for (size_t r = 0; r < rows; r++) finish(a, row + r, pair, sums + r * PAIR_COLUMNS);
        }
    }
}
