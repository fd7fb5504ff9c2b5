// The one matrix tile: every product of the library, a row at decode or hundreds at prefill, a linear layer's
// or attention's, is sums of these, so every path adds in the same order.
//
//     acc[r][p] += sum over k, ascending, of a[k][r] · b[k][p]
//
// r is one of at most TILE_ROWS rows, p one of at most TILE_PANELS panels of 16 columns, b comes in words of
// 32 bits, 16 to a register: a float32, or a pair of bfloat16 that lie next to each other along k ("words"
// below). How a stands in memory depends on the rung, since AVX2 has no bfloat16 product: A_WORDS_OF_PAIR
// float32 for each pair there.
#pragma once
#include "elements.h"

// The largest tile whose sums stay in registers: 24 zmm of 32, or 10 ymm of 16 (gcc spills with 12, for a third of the
// speed; 10 reach 95 % of the peak). One row takes more panels: they are streams that the CPU fetches ahead.
#if RUNG_AVX512
enum { TILE_ROWS = 12, TILE_PANELS = 2, A_WORDS_OF_PAIR = 1 };
#else
enum { TILE_ROWS = 5, TILE_PANELS = 1, A_WORDS_OF_PAIR = 2 };
#endif
enum { ONE_ROW_PANELS = 4 };
// Bytes of weights that are asked for before they are read, of all panels together. What comes from memory then comes while
// rows are multiplied: without, 8 rows take as long as both do one after the other.
enum { WEIGHTS_AHEAD = 8192 };
enum { LINE = 64 }; // bytes of a word of b, and of a line of the cache

typedef uint32_t __attribute__((may_alias, aligned(2))) word; // the bits of a float32 or of two bfloat16
typedef uint16_t __attribute__((may_alias)) bf16_bits;

// Words of b along k, and of a, for n elements.
INLINE size_t words_of(enum kind kind, size_t n) { return kind == BF16 ? (n + 1) / 2 : n; }
INLINE size_t a_words_of(enum kind kind, size_t n) { return kind == BF16 ? (n + 1) / 2 * A_WORDS_OF_PAIR : n; }

// Writes n elements of x as words of a, `step` words apart; an odd last bfloat16 is paired with zero.
INLINE void put_a(enum kind kind, word *a, size_t step, const void *x, size_t n) {
    if (kind == F32) {
        const word *from = x;
        for (size_t i = 0; i < n; i++) a[i * step] = from[i];
        return;
    }
    const bf16_bits *from = x;
#if RUNG_AVX512
    for (size_t i = 0; i < n / 2; i++) a[i * step] = from[2 * i] | (word)from[2 * i + 1] << 16;
    if (n % 2) a[n / 2 * step] = from[n - 1];
#else
    for (size_t i = 0; i < n; i++) a[i * step] = (word)from[i] << 16;
    if (n % 2) a[n * step] = 0;
#endif
}

// Four words of a: of as many elements, or of twice as many that are pairs.
enum { PAIRS_ARE_WORDS = A_WORDS_OF_PAIR == 1 };
INLINE __m128 four_words(enum kind kind, const void *x, size_t i) {
    if (kind == F32 || PAIRS_ARE_WORDS) return _mm_loadu_ps(at(kind, x, i));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadu_si64(at(kind, x, i))), 16));
}

// put_a of four rows, `stride` bytes apart, whose words stand side by side: what is written is written whole.
INLINE void put_4_rows(enum kind kind, word *a, size_t step, const void *x, size_t stride, size_t n) {
    const size_t elements = kind == BF16 && PAIRS_ARE_WORDS ? 8 : 4;
    const char *row[4] = {x, (const char *)x + stride, (const char *)x + 2 * stride, (const char *)x + 3 * stride};
    size_t i = 0;
    for (; i + elements <= n; i += elements, a += 4 * step) {
        __m128 w[4];
        for (int r = 0; r < 4; r++) w[r] = four_words(kind, row[r], i);
        _MM_TRANSPOSE4_PS(w[0], w[1], w[2], w[3]);
        for (size_t r = 0; r < 4; r++) _mm_storeu_ps((float *)(a + r * step), w[r]);
    }
    for (int r = 0; r < 4; r++) put_a(kind, a + r, step, at(kind, row[r], i), n - i);
}

// What is asked for meanwhile, of each panel: bytes from b, and from one k to the next.
struct fetch {
    ptrdiff_t ahead;
    size_t step;
};

struct tile {
    const word *a;
    size_t a_step, a_row; // words from one k to the next, from one row to the next
    const word *b;
    size_t b_step, b_panel; // words from one k to the next, from one panel to the next
    size_t num_words;       // words of b along k
    struct fetch fetch;     // with FETCH
};

// acc[r][p] += a[r] · column[p], of float32
INLINE void multiply_rows(const int ROWS, const int PANELS, const word *a, size_t a_row, const __m512 *column,
                          __m512 *acc) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        const __m512 x = _mm512_castsi512_ps(_mm512_set1_epi32((int)a[r * a_row]));
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) acc[r * PANELS + p] = _mm512_fmadd_ps(x, column[p], acc[r * PANELS + p]);
    }
}

// acc is (ROWS, PANELS); both are constants where this is called.
INLINE void multiply_tile(enum kind kind, const bool FETCH, const int ROWS, const int PANELS, const struct tile *t,
                          __m512 *acc) {
    const word *a = t->a, *b = t->b;
    const char *ahead = (const char *)b + t->fetch.ahead;
    for (size_t k = 0; k < t->num_words; k++, b += t->b_step) {
        if (FETCH)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++)
                _mm_prefetch(ahead + k * t->fetch.step + p * t->b_panel * sizeof(word), _MM_HINT_T1);
#if RUNG_AVX2
        if (kind == BF16) { // even elements of the pairs, then odd; they are loaded for each, not kept
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++, a += t->a_step) {
                __m512 column[ONE_ROW_PANELS];
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; p++) {
                    const __m512i words = _mm512_loadu_si512(b + p * t->b_panel);
                    column[p] = _mm512_castsi512_ps(odd ? _mm512_and_epi32(words, _mm512_set1_epi32((int)0xffff0000))
                                                        : _mm512_slli_epi32(words, 16));
                }
                multiply_rows(ROWS, PANELS, a, t->a_row, column, acc);
            }
            continue;
        }
#endif
        __m512i words[ONE_ROW_PANELS]; // the largest that PANELS can be: C has no other constant here
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) words[p] = _mm512_loadu_si512(b + p * t->b_panel);
#if RUNG_AVX512
        if (kind == BF16) {
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                const __m512bh pair = as_bf16x32(_mm512_set1_epi32((int)a[r * t->a_row]));
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; p++)
                    acc[r * PANELS + p] = _mm512_dpbf16_ps(acc[r * PANELS + p], as_bf16x32(words[p]), pair);
            }
            a += t->a_step;
            continue;
        }
#endif
        __m512 column[ONE_ROW_PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) column[p] = _mm512_castsi512_ps(words[p]);
        multiply_rows(ROWS, PANELS, a, t->a_row, column, acc);
        a += t->a_step;
    }
}

// sums (rows, 16 · panels) float32, `stride` elements apart, += the tile; or, with FRESH, = the tile.
INLINE void sum_tile_of(enum kind kind, const bool FRESH, const bool FETCH, const int ROWS, const int PANELS,
                        const struct tile *t, float *sums, size_t stride) {
    __m512 acc[TILE_ROWS * ONE_ROW_PANELS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
            acc[r * PANELS + p] = FRESH ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * stride + 16 * p);
    multiply_tile(kind, FETCH, ROWS, PANELS, t, acc);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) _mm512_storeu_ps(sums + r * stride + 16 * p, acc[r * PANELS + p]);
}

// The same for any number of rows up to TILE_ROWS.
#define ROWS_CASE(n)                                                                                                   \
    case n:                                                                                                            \
        sum_tile_of(kind, FRESH, FETCH, n, PANELS, t, sums, stride);                                                   \
        break;
INLINE void sum_tile(enum kind kind, const bool FRESH, const bool FETCH, size_t rows, const int PANELS,
                     const struct tile *t, float *sums, size_t stride) {
    switch (rows) {
        ROWS_CASE(1)
        ROWS_CASE(2)
        ROWS_CASE(3)
        ROWS_CASE(4)
        ROWS_CASE(5)
#if RUNG_AVX512
        ROWS_CASE(6)
        ROWS_CASE(7)
        ROWS_CASE(8)
        ROWS_CASE(9)
        ROWS_CASE(10)
        ROWS_CASE(11)
        ROWS_CASE(12)
#endif
    }
}
