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

// bfloat16 of E2M1 times 2^(125 - s): codes are bits 4·n … 4·n + 3 of each 16-bit lane, and 8, the negative zero, is none
// of them; `exponents` is s · 2^7, and leaves all values normal. The table has them at 2^125: a zero that the exponent is
// taken from stays one, as the subtraction saturates.
INLINE __m512i bf16_of_e2m1(__m512i codes, int n, __m512i exponents) {
    // The instruction looks at five bits: the table is there twice, so that the next code's lowest does not matter.
    static const uint16_t values[32] __attribute__((aligned(64))) = {
        0x0000, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40, 0x0000, 0xfd80, 0xfe00,
        0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40, 0x0000, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0,
        0x7f00, 0x7f40, 0x0000, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40,
    };
    if (n > 0) codes = _mm512_srli_epi16(codes, 4 * n);
    return _mm512_subs_epu16(_mm512_permutexvar_epi16(codes, _mm512_load_si512(values)), exponents);
}
