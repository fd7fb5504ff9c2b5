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
