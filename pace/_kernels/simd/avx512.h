#pragma once
#include <immintrin.h>

INLINE __m512bh as_bf16x32(__m512i x) { return (__m512bh)x; }
INLINE __m256i bits_of_bf16x16(__m256bh x) { return (__m256i)x; }

// p·2^n for p near 1 and integral n; 0 where x < least.
INLINE __m512 scale_from(float least, __m512 x, __m512 p, __m512 n) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_NLT_UQ), p, n);
}

// The lanes of the mask, written one after another; returns how many. There must be room for 16: to write
// just those (vpcompressd to memory) is microcode on Zen 4.
INLINE size_t compress_epi32(void *p, __mmask16 m, __m512i a) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, a));
    return (size_t)__builtin_popcount(m);
}
INLINE size_t compress_ps(void *p, __mmask16 m, __m512 a) { return compress_epi32(p, m, _mm512_castps_si512(a)); }

// bfloat16 of E2M1: the codes are bits 4·N … 4·N + 3 of each 16-bit lane. `exponent` is what is added to the exponent
// of all but zeros, a multiple of 2^7.
#define bf16_of_e2m1(codes, N, exponent) scaled_e2m1(_mm512_srli_epi16(codes, 4 * (N)), exponent)
INLINE __m512i scaled_e2m1(__m512i codes, __m512i exponent) {
    // The instruction looks at five bits: the table is there twice, so that the next code's lowest does not matter.
    static const uint16_t values[32] __attribute__((aligned(64))) = {
        0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
        0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
        0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,
    };
    const __m512i x = _mm512_permutexvar_epi16(codes, _mm512_load_si512(values));
    return _mm512_mask_add_epi16(x, _mm512_test_epi16_mask(x, _mm512_set1_epi16(0x7fff)), x, exponent);
}
