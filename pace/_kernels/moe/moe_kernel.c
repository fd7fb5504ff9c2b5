#include "moe/moe.h"
#include "moe/mxfp4.h"
#include "simd/math.h"

#define APART static __attribute__((noinline))

#if RUNG_AVX512
enum { FEW_ROWS = 4 };
#else
enum { FEW_ROWS = 1 };
#endif
enum { ITEM_COLUMNS = 16 * ITEM_PANELS };

// Where a row of a unit stands in an arranged matrix of a_words words a row: its tile's first word, which of its rows it
// is, and of how many.
struct row {
    size_t tile_word, place, tile_rows;
};
INLINE struct row row_of(const struct moe_unit *unit, size_t i, size_t a_words) {
    const size_t first = i / TILE_ROWS * TILE_ROWS, left = unit->rows - first;
    return (struct row){(unit->first + first) * a_words, i - first, left < TILE_ROWS ? left : TILE_ROWS};
}

INLINE void arrange(enum kind kind, const struct moe_args *a, const struct moe_unit *unit) {
    const size_t hidden = a->gate_up.in_features, a_words = a_words_of(kind, hidden);
    for (size_t i = 0; i < unit->rows; i++) {
        const size_t token = a->places[unit->first + i] / a->k;
        const struct row row = row_of(unit, i, a_words);
        put_a(kind, a->a + row.tile_word + row.place, row.tile_rows, (const char *)a->x + token * a->x_stride, hidden);
    }
}

void RUNG_NAME(moe_arrange)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct moe_args *a = args;
    (void)scratch;
    for (size_t item = begin; item < end; item++) {
        if (a->kind == BF16)
            arrange(BF16, a, a->units + item);
        else
            arrange(F32, a, a->units + item);
    }
}

// sums (rows of the unit, 64) += the product with `t`'s words of up to four panels; their first is word `a_first` of a.
INLINE void add_tiles(enum kind kind, const bool FETCH, const struct moe_unit *unit, const word *a, size_t a_words,
                      size_t a_first, size_t panels, struct tile t, float *sums) {
    t.a_row = 1;
    if (unit->rows == 1 && panels == ONE_ROW_PANELS) {
        t.a = a + unit->first * a_words + a_first;
        t.a_step = 1;
        sum_tile_of(kind, false, FETCH, 1, ONE_ROW_PANELS, &t, sums, 0);
        return;
    }
    for (size_t p = 0; p < panels;) {
        const size_t together = panels - p < TILE_PANELS ? 1 : TILE_PANELS;
        for (size_t row = 0; row < unit->rows; row += TILE_ROWS) {
            const struct row tile = row_of(unit, row, a_words);
            float *to = sums + row * ITEM_COLUMNS + 16 * p;
            t.a = a + tile.tile_word + a_first * tile.tile_rows;
            t.a_step = tile.tile_rows;
            if (together == TILE_PANELS)
                sum_tile(kind, false, FETCH, tile.tile_rows, TILE_PANELS, &t, to, ITEM_COLUMNS);
            else
                sum_tile(kind, false, FETCH, tile.tile_rows, 1, &t, to, ITEM_COLUMNS);
        }
        t.b += together * t.b_panel;
        p += together;
    }
}

#define FEW_ROWS_CASE(n)                                                                                               \
    case n:                                                                                                            \
        if (kind == BF16)                                                                                              \
            sum_mxfp4(BF16, n, ITEM_PANELS, a, panels, panel_bytes, num_blocks, sums, ITEM_COLUMNS);                   \
        else                                                                                                           \
            sum_mxfp4(F32, n, ITEM_PANELS, a, panels, panel_bytes, num_blocks, sums, ITEM_COLUMNS);                    \
        break;
APART void sum_few_rows(enum kind kind, size_t rows, const word *a, const uint8_t *panels, size_t panel_bytes,
                        size_t num_blocks, float *sums) {
    switch (rows) {
        FEW_ROWS_CASE(1)
#if RUNG_AVX512
        FEW_ROWS_CASE(2)
        FEW_ROWS_CASE(3)
        FEW_ROWS_CASE(4)
#endif
    }
}

// sums (rows of the unit, 64) = their product with the four panels from `first_panel` on.
INLINE void product_of_item(enum kind kind, const struct moe_weight *w, const struct moe_unit *unit, const word *a,
                            size_t first_panel, word *unpacked, float *sums) {
    const size_t left = w->num_panels - first_panel, panels = left < ITEM_PANELS ? left : ITEM_PANELS;
    const size_t a_words = a_words_of(kind, w->in_features);
    const uint8_t *from = (const uint8_t *)w->panels + (unit->expert * w->num_panels + first_panel) * w->panel_bytes;
    for (size_t i = 0; i < unit->rows * ITEM_COLUMNS; i += 16) _mm512_storeu_ps(sums + i, _mm512_setzero_ps());
    struct tile t = {.b_step = 16};
    if (!w->is_mxfp4) {
        t.b = (const word *)from;
        t.num_words = words_of(kind, w->in_features);
        t.b_panel = t.num_words * 16;
        t.fetch = (struct fetch){WEIGHTS_AHEAD / (unit->rows == 1 ? ONE_ROW_PANELS : TILE_PANELS), LINE};
        add_tiles(kind, true, unit, a, a_words, 0, panels, t, sums);
        return;
    }
    const size_t num_blocks = w->in_features / MXFP4_BLOCK;
    if (unit->rows <= FEW_ROWS && panels == ITEM_PANELS) {
        sum_few_rows(kind, unit->rows, a + unit->first * a_words, from, w->panel_bytes, num_blocks, sums);
        return;
    }
    t.b = unpacked;
    t.b_panel = words_of(kind, CHUNK_BLOCKS * MXFP4_BLOCK) * 16;
    for (size_t block = 0; block < num_blocks; block += CHUNK_BLOCKS) {
        const size_t blocks = num_blocks - block < CHUNK_BLOCKS ? num_blocks - block : CHUNK_BLOCKS;
        for (size_t p = 0; p < panels; p++)
            unpack_blocks(kind, from + p * w->panel_bytes + block * MXFP4_BLOCK_BYTES, blocks,
                          unpacked + p * t.b_panel);
        t.num_words = words_of(kind, blocks * MXFP4_BLOCK);
        add_tiles(kind, false, unit, a, a_words, a_words_of(kind, block * MXFP4_BLOCK), panels, t, sums);
    }
}

APART void product_of_any(const struct moe_args *a, const struct moe_weight *w, const struct moe_unit *unit,
                          const word *rows, size_t first_panel, word *unpacked, float *sums) {
    if (a->kind == BF16)
        product_of_item(BF16, w, unit, rows, first_panel, unpacked, sums);
    else
        product_of_item(F32, w, unit, rows, first_panel, unpacked, sums);
}

// (up + 1) · (gate · sigmoid(alpha · gate)) of 16 columns, rounded to the rows of `inner`
INLINE void finish_gated(enum kind kind, const struct moe_args *a, const struct moe_unit *unit, size_t i, size_t column,
                         const float *sums) {
    const size_t features = a->gate_up.out_features;
    const __mmask16 mask = first16(features - column);
    __m512 gate = _mm512_loadu_ps(sums), up = _mm512_loadu_ps(sums + 16);
    if (a->gate_up.bias) {
        const float *bias = a->gate_up.bias + unit->expert * 2 * features;
        gate = _mm512_add_ps(gate, load(F32, bias, column, mask));
        up = _mm512_add_ps(up, load(F32, bias, features + column, mask));
    }
    gate = _mm512_min_ps(_mm512_set1_ps(a->limit), gate); // the operand order keeps a NaN
    up = clamp_ps(up, -a->limit, a->limit);
    const __m512 glu = _mm512_mul_ps(gate, sigmoid_ps(_mm512_mul_ps(_mm512_set1_ps(a->alpha), gate)));
    const __m512 x = _mm512_mul_ps(_mm512_add_ps(up, _mm512_set1_ps(1.f)), glu);
    float columns[16];
    store(kind, columns, 0, FULL, x);
    const struct row row = row_of(unit, i, a_words_of(kind, features));
    word *to = a->inner + row.tile_word + a_words_of(kind, column) * row.tile_rows + row.place;
    put_a(kind, to, row.tile_rows, columns, features - column < 16 ? features - column : 16);
}

void RUNG_NAME(moe_gate_up)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct moe_args *a = args;
    const size_t items = (a->gate_up.num_panels + ITEM_PANELS - 1) / ITEM_PANELS;
    float *sums = scratch;
    word *unpacked = (word *)(sums + MOE_SUMS);
    for (size_t item = begin; item < end; item++) {
        const struct moe_unit *unit = a->units + item / items;
        const size_t first_panel = item % items * ITEM_PANELS;
        product_of_any(a, &a->gate_up, unit, a->a, first_panel, unpacked, sums);
        for (size_t i = 0; i < unit->rows; i++)
            for (size_t p = 0; p < ITEM_PANELS; p += 2) {
                const size_t column = (first_panel + p) / 2 * 16;
                if (column >= a->gate_up.out_features) break;
                if (a->kind == BF16)
                    finish_gated(BF16, a, unit, i, column, sums + i * ITEM_COLUMNS + 16 * p);
                else
                    finish_gated(F32, a, unit, i, column, sums + i * ITEM_COLUMNS + 16 * p);
            }
    }
}

void RUNG_NAME(moe_down)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct moe_args *a = args;
    const size_t items = (a->down.num_panels + ITEM_PANELS - 1) / ITEM_PANELS, features = a->down.out_features;
    float *sums = scratch;
    word *unpacked = (word *)(sums + MOE_SUMS);
    for (size_t item = begin; item < end; item++) {
        const struct moe_unit *unit = a->units + item / items;
        const size_t first_panel = item % items * ITEM_PANELS;
        product_of_any(a, &a->down, unit, a->inner, first_panel, unpacked, sums);
        for (size_t i = 0; i < unit->rows; i++)
            for (size_t p = 0; p < ITEM_PANELS && (first_panel + p) * 16 < features; p++) {
                const size_t column = (first_panel + p) * 16;
                const __mmask16 mask = first16(features - column);
                __m512 answer = _mm512_loadu_ps(sums + i * ITEM_COLUMNS + 16 * p);
                if (a->down.bias)
                    answer = _mm512_add_ps(answer, load(F32, a->down.bias + unit->expert * features, column, mask));
                store(F32, a->answers + a->places[unit->first + i] * features, column, mask, answer);
            }
    }
}

INLINE void combine(enum kind kind, const struct moe_args *a, size_t token) {
    const size_t features = a->down.out_features;
    const float *answers = a->answers + token * a->k * features;
    const float *weights = (const float *)((const char *)a->weights + token * a->weights_stride);
    for_each_16(i, mask, features) {
        __m512 sum = _mm512_setzero_ps();
        for (size_t rank = 0; rank < a->k; rank++) {
            const __m512 answer = load(F32, answers + rank * features, i, mask);
            sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_set1_ps(weights[rank]), answer));
        }
        store(kind, (char *)a->out + token * a->out_stride, i, mask, sum);
    }
}

void RUNG_NAME(moe_combine)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct moe_args *a = args;
    (void)scratch;
    for (size_t token = begin; token < end; token++) {
        if (a->kind == BF16)
            combine(BF16, a, token);
        else
            combine(F32, a, token);
    }
}
