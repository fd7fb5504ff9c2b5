// MXFP4 in panels (pace/reference/pack_experts.py has the layout), unpacked to words of the matrix tile.
#pragma once
#include "simd/tile.h"

enum { MXFP4_BLOCK = 32, MXFP4_BLOCK_BYTES = 17 * 16, MXFP4_MAX_SCALE = 252 };

// What bf16_of_e2m1 takes from the exponents of 16 rows, in both halves of their lanes.
INLINE __m512i exponents_of(const uint8_t *scales) {
    const __m512i s = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)scales));
    const __m512i n = _mm512_sub_epi32(_mm512_set1_epi32(MXFP4_MAX_SCALE), s);
    return _mm512_or_epi32(_mm512_slli_epi32(n, 7), _mm512_slli_epi32(n, 23));
}

// A pair of neighbours along k, of 16 rows: one word of bfloat16, or two of float32.
INLINE word *put_pair(enum kind kind, word *to, __m512i pair) {
    if (kind == BF16) {
        _mm512_storeu_si512(to, pair);
        return to + 16;
    }
    _mm512_storeu_si512(to, _mm512_slli_epi32(pair, 16));
    _mm512_storeu_si512(to + 16, _mm512_and_epi32(pair, _mm512_set1_epi32((int)0xffff0000)));
    return to + 32;
}

// Unpacks so many blocks of 32 k of a panel.
INLINE void unpack_blocks(enum kind kind, const uint8_t *from, size_t blocks, word *to) {
    for (size_t block = 0; block < blocks; block++, from += MXFP4_BLOCK_BYTES) {
        const __m512i exponents = exponents_of(from);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const __m512i codes = _mm512_loadu_si512(from + 16 + 64 * q);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) to = put_pair(kind, to, bf16_of_e2m1(codes, n, exponents));
        }
    }
}

// acc += the product of a pair of neighbours along k, of 16 rows, and the words of a for them; added as by the tile.
INLINE __m512 add_pair(enum kind kind, __m512 acc, __m512i pair, const word *a, size_t a_step) {
#if RUNG_AVX512
    if (kind == BF16) return _mm512_dpbf16_ps(acc, as_bf16x32(pair), as_bf16x32(_mm512_set1_epi32((int)a[0])));
#else
    (void)kind;
#endif
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_epi32(pair, _mm512_set1_epi32((int)0xffff0000)));
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32((int)a[0])), even, acc);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32((int)a[a_step])), odd, acc);
}

// sums (ROWS, 16 · PANELS), `stride` elements apart, += the product of a tile's rows and panels of MXFP4, which is not
// unpacked to memory: for few rows.
INLINE void sum_mxfp4(enum kind kind, const int ROWS, const int PANELS, const word *a, const uint8_t *panels,
                      size_t panel_bytes, size_t num_blocks, float *sums, size_t stride) {
    __m512 acc[16];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) acc[r * PANELS + p] = _mm512_loadu_ps(sums + r * stride + 16 * p);
    const size_t a_pair = a_words_of(kind, 2) * (size_t)ROWS;
    for (size_t block = 0; block < num_blocks; block++, panels += MXFP4_BLOCK_BYTES) {
        __m512i exponents[4];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) exponents[p] = exponents_of(panels + p * panel_bytes);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            __m512i codes[4];
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++) codes[p] = _mm512_loadu_si512(panels + p * panel_bytes + 16 + 64 * q);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++, a += a_pair)
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; p++) {
                    const __m512i pair = bf16_of_e2m1(codes[p], n, exponents[p]);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++)
                        acc[r * PANELS + p] = add_pair(kind, acc[r * PANELS + p], pair, a + r, ROWS);
                }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) _mm512_storeu_ps(sums + r * stride + 16 * p, acc[r * PANELS + p]);
}
