// The product of rows and packed panels that linear and gated_mlp share; they differ in what becomes of its
// sums.
#pragma once
#include "linear/linear.h"
#include "simd/activation.h"
#include "simd/tile.h"

enum { PAIR_COLUMNS = 32 };
// Words along k that all tiles of a block pass over before the next ones' turn: those of a pair of panels stay near, in
// the L1 cache where that has 48 KB. Sums are taken in the same order as without.
enum { WORDS_PER_PASS = 256 };

// sums (rows, 32) += words [begin, end) of a tile of rows and the panels 2·pair and 2·pair + 1.
INLINE void sum_pair(enum kind kind, const struct linear_args *a, size_t first_row, size_t rows, size_t pair,
                     size_t begin, size_t end, struct fetch fetch, float *sums) {
    const size_t words = words_of(kind, a->in_features), a_words = a_words_of(kind, a->in_features);
    const size_t panels = a->num_panels - 2 * pair < 2 ? 1 : 2;
    struct tile t = {
        .a = a->a + first_row * a_words + begin * (kind == BF16 ? A_WORDS_OF_PAIR : 1) * rows,
        .a_step = rows,
        .a_row = 1,
        .b = a->panels + (2 * pair * words + begin) * 16,
        .b_step = 16,
        .b_panel = words * 16,
        .num_words = end - begin,
        .fetch = fetch,
    };
    if (TILE_PANELS == 2 && panels == 2) {
        sum_tile(kind, false, true, rows, TILE_PANELS, &t, sums, PAIR_COLUMNS);
        return;
    }
    for (size_t p = 0; p < panels; p++, t.b += t.b_panel)
        sum_tile(kind, false, true, rows, 1, &t, sums + 16 * p, PAIR_COLUMNS);
}

// The first tile asks for its own words, a little ahead; each of the others for its part of those of the next pass, or of
// the next pair's first: they come while all tiles are multiplied, not at the pace of one.
INLINE struct fetch fetch_of(size_t tile, size_t tiles, size_t begin, size_t end, size_t words) {
    if (tile == 0) return (struct fetch){WEIGHTS_AHEAD / TILE_PANELS, LINE};
    const size_t next = end < words ? end - begin : 2 * words - begin, step = (LINE + tiles - 2) / (tiles - 1);
    return (struct fetch){(ptrdiff_t)(next * LINE + (tile - 1) * (end - begin) * step), step};
}

// sums (rows, 32) of a block of rows and these panels
INLINE void sum_block(enum kind kind, const struct linear_args *a, size_t first_row, size_t rows, size_t pair,
                      float *sums) {
    const size_t words = words_of(kind, a->in_features), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const size_t pass = tiles == 1 ? words : WORDS_PER_PASS;
    for (size_t i = 0; i < rows * PAIR_COLUMNS; i += 16) _mm512_storeu_ps(sums + i, _mm512_setzero_ps());
    for (size_t begin = 0; begin < words; begin += pass) {
        const size_t end = words - begin < pass ? words : begin + pass;
        for (size_t tile = 0; tile < tiles; tile++) {
            const size_t row = tile * TILE_ROWS, left = rows - row;
            sum_pair(kind, a, first_row + row, left < TILE_ROWS ? left : TILE_ROWS, pair, begin, end,
                     fetch_of(tile, tiles, begin, end, words), sums + row * PAIR_COLUMNS);
        }
    }
}

INLINE void sum_block_by_brgemm(const struct linear_args *a, size_t first_row, size_t rows, size_t pair, float *sums) {
    const size_t words = words_of(a->kind, a->in_features);
    for (size_t p = 0; p < 2 && 2 * pair + p < a->num_panels; p++)
        brgemm(a->brgemm, rows == ROWS_PER_BLOCK, a->panels + (2 * pair + p) * words * 16,
               (const char *)a->x + first_row * a->x_stride, sums + 16 * p);
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
        .fetch = {WEIGHTS_AHEAD / ONE_ROW_PANELS, LINE},
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

INLINE void product(const struct linear_args *a, size_t begin, size_t end, finish_row *finish) {
    if (a->rows == 1 && !a->brgemm) {
        product_of_one_row(a, begin, end, finish);
        return;
    }
    const size_t pairs = (a->num_panels + 1) / 2;
    float sums[ROWS_PER_BLOCK * PAIR_COLUMNS] __attribute__((aligned(64)));
    for (size_t item = begin; item < end; item++) {
        const size_t pair = item % pairs, first = item / pairs * ROWS_PER_BLOCK, left = a->rows - first;
        const size_t rows = left < ROWS_PER_BLOCK ? left : ROWS_PER_BLOCK;
        if (a->brgemm)
            sum_block_by_brgemm(a, first, rows, pair, sums);
        else if (a->kind == BF16)
            sum_block(BF16, a, first, rows, pair, sums);
        else
            sum_block(F32, a, first, rows, pair, sums);
        for (size_t r = 0; r < rows; r++) finish(a, first + r, pair, sums + r * PAIR_COLUMNS);
    }
}
