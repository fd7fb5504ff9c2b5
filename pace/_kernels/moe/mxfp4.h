// MXFP4 in panels (pace/reference/pack_experts.py has the layout), unpacked to words of the matrix tile.
#pragma once
#include "simd/tile.h"

enum { MXFP4_BLOCK = 32, MXFP4_BLOCK_BYTES = 17 * 16 };

// (scale - 127) · 2^7 in both halves of the lanes of 16 rows: what is added to the exponent of their bfloat16.
INLINE __m512i exponents_of(const uint8_t *scales) {
    const __m512i s =
        _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)scales)), _mm512_set1_epi32(127));
    const __m512i low = _mm512_and_epi32(_mm512_slli_epi32(s, 7), _mm512_set1_epi32(0xffff));
    return _mm512_or_epi32(low, _mm512_slli_epi32(s, 23));
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
            to = put_pair(kind, to, bf16_of_e2m1(codes, 0, exponents));
            to = put_pair(kind, to, bf16_of_e2m1(codes, 1, exponents));
            to = put_pair(kind, to, bf16_of_e2m1(codes, 2, exponents));
            to = put_pair(kind, to, bf16_of_e2m1(codes, 3, exponents));
        }
    }
}
