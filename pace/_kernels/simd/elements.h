// Rows of float32 or bfloat16, read and written sixteen elements at a time as float32. `kind` is a constant
// wherever these are called, so that each use compiles to the loads of one dtype.
#pragma once
#include "simd.h"

enum kind { F32, BF16 };

INLINE size_t bytes_of(enum kind kind) { return kind == BF16 ? 2 : 4; }

INLINE const void *at(enum kind kind, const void *row, size_t i) { return (const char *)row + i * bytes_of(kind); }
INLINE void *at_mut(enum kind kind, void *row, size_t i) { return (char *)row + i * bytes_of(kind); }

INLINE __m512 f32_of_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE __m512 load16(enum kind kind, const void *row, size_t i) {
    const void *p = at(kind, row, i);
    return kind == BF16 ? f32_of_bf16(_mm256_loadu_si256(p)) : _mm512_loadu_ps(p);
}
INLINE __m512 load16_masked(enum kind kind, const void *row, size_t i, __mmask16 mask) {
    const void *p = at(kind, row, i);
    return kind == BF16 ? f32_of_bf16(_mm256_maskz_loadu_epi16(mask, p)) : _mm512_maskz_loadu_ps(mask, p);
}
INLINE void store16(enum kind kind, void *row, size_t i, __m512 x) {
    void *p = at_mut(kind, row, i);
    if (kind == BF16)
        _mm256_storeu_si256(p, bits_of_bf16x16(_mm512_cvtneps_pbh(x)));
    else
        _mm512_storeu_ps(p, x);
}
INLINE void store16_masked(enum kind kind, void *row, size_t i, __mmask16 mask, __m512 x) {
    void *p = at_mut(kind, row, i);
    if (kind == BF16)
        _mm256_mask_storeu_epi16(p, mask, bits_of_bf16x16(_mm512_cvtneps_pbh(x)));
    else
        _mm512_mask_storeu_ps(p, mask, x);
}

// for_each_16(i, mask, n) { ... } walks a row of n elements; only the last step's mask may be partial. A full
// mask is tested for, not masked with: AVX2 has no cheap masked access.
#define for_each_16(i, mask, n)                                                                                        \
    for (size_t i = 0, mask = first16(n); i < (n); i += 16, mask = i < (n) ? first16((n) - i) : 0)
#define FULL 0xffff

INLINE __m512 load(enum kind kind, const void *row, size_t i, __mmask16 mask) {
    return mask == FULL ? load16(kind, row, i) : load16_masked(kind, row, i, mask);
}
INLINE void store(enum kind kind, void *row, size_t i, __mmask16 mask, __m512 x) {
    if (mask == FULL)
        store16(kind, row, i, x);
    else
        store16_masked(kind, row, i, mask, x);
}
// Stores x, and returns it as it was stored: rounded.
INLINE __m512 store_rounded(enum kind kind, void *row, size_t i, __mmask16 mask, __m512 x) {
    if (kind == F32) {
        store(F32, row, i, mask, x);
        return x;
    }
    const __m256i bits = bits_of_bf16x16(_mm512_cvtneps_pbh(x));
    void *p = at_mut(BF16, row, i);
    if (mask == FULL)
        _mm256_storeu_si256(p, bits);
    else
        _mm256_mask_storeu_epi16(p, mask, bits);
    return f32_of_bf16(bits);
}
