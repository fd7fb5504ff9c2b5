#include "linear/product.h"

INLINE void arrange(enum kind kind, const struct linear_args *a, size_t begin, size_t end) {
    const size_t a_words = a_words_of(kind, a->in_features);
    for (size_t row = begin, together; row < end; row += together) {
        const size_t first = row / TILE_ROWS * TILE_ROWS;
        const size_t rows = a->rows - first < TILE_ROWS ? a->rows - first : TILE_ROWS;
        const void *x = (const char *)a->x + row * a->x_stride;
        word *to = a->a + first * a_words + (row - first);
        together = row + 4 <= end && row + 4 <= first + rows ? 4 : 1;
        if (together == 4)
            put_4_rows(kind, to, rows, x, a->x_stride, a->in_features);
        else
            put_a(kind, to, rows, x, a->in_features);
    }
}

void RUNG_NAME(linear_arrange)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct linear_args *a = args;
    (void)scratch;
    if (a->kind == BF16)
        arrange(BF16, a, begin, end);
    else
        arrange(F32, a, begin, end);
}

// bias, activation, multiply, residual, and the one rounding
INLINE void finish_columns(enum kind kind, const struct linear_args *a, size_t row, size_t column, __mmask16 mask,
                           __m512 sum) {
    if (a->bias) sum = _mm512_add_ps(sum, load(F32, a->bias, column, mask));
    sum = activate(a->activation, sum);
    if (a->multiply) {
        const void *factors = (const char *)a->multiply + row * a->multiply_stride;
        sum = _mm512_mul_ps(sum, load(kind, factors, column, mask));
    }
    if (a->residual) {
        const void *terms = (const char *)a->residual + row * a->residual_stride;
        sum = _mm512_add_ps(sum, load(kind, terms, column, mask));
    }
    store(kind, (char *)a->out + row * a->out_stride, column, mask, sum);
}

static void finish_linear(const struct linear_args *a, size_t row, size_t pair, const float *sums) {
    for (size_t i = 0; i < PAIR_COLUMNS; i += 16) {
        const size_t column = pair * PAIR_COLUMNS + i;
        if (column >= a->out_features) break;
        const __mmask16 mask = first16(a->out_features - column);
        if (a->out_kind == BF16)
            finish_columns(BF16, a, row, column, mask, _mm512_loadu_ps(sums + i));
        else
            finish_columns(F32, a, row, column, mask, _mm512_loadu_ps(sums + i));
    }
}

void RUNG_NAME(linear)(const void *args, size_t begin, size_t end, void *scratch) {
    (void)scratch;
    product(args, begin, end, finish_linear);
}
