// The sums and passes that norms share, each over one row in float32.
#pragma once
#include <math.h>
#include "elements.h"

// The row to be normed is x, or with a residual x + residual, kept there and taken as it was rounded.
INLINE __m512 take(enum kind kind, const void *x, void *residual, size_t i, __mmask16 mask) {
    const __m512 v = load(kind, x, i, mask);
    if (!residual) return v;
    return store_rounded(kind, residual, i, mask, _mm512_add_ps(v, load(kind, residual, i, mask)));
}

enum term { VALUE, SQUARE, SQUARED_DEVIATION };

INLINE __m512 add_term(enum term term, __m512 sum, __m512 v, __m512 mean, __mmask16 mask) {
    if (term == VALUE) return _mm512_add_ps(sum, v);
    if (term == SQUARED_DEVIATION) {
        v = _mm512_sub_ps(v, mean);
        if (mask != FULL) v = _mm512_maskz_mov_ps(mask, v);
    }
    return _mm512_fmadd_ps(v, v, sum);
}

// The mean of a term over a row. Four partial sums, or each addition would wait for the one before it.
INLINE float mean_of(enum term term, enum kind kind, const void *x, void *residual, size_t n, float mean) {
    const __m512 means = _mm512_set1_ps(mean), zero = _mm512_setzero_ps();
    __m512 sum[4] = {zero, zero, zero, zero};
    size_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (size_t part = 0; part < 4; part++)
            sum[part] = add_term(term, sum[part], take(kind, x, residual, i + 16 * part, FULL), means, FULL);
    for (; i < n; i += 16) {
        const __mmask16 mask = first16(n - i);
        sum[0] = add_term(term, sum[0], take(kind, x, residual, i, mask), means, mask);
    }
    const __m512 total = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    return _mm512_reduce_add_ps(total) / (float)n;
}

// 1 / sqrt(mean(x²) + eps)
INLINE float inverse_rms(enum kind kind, const void *x, void *residual, size_t n, float eps) {
    return 1.f / sqrtf(mean_of(SQUARE, kind, x, residual, n, 0.f) + eps);
}

// 1 / sqrt(mean((x - mean)²) + eps)
INLINE float inverse_deviation(enum kind kind, const void *x, size_t n, float mean, float eps) {
    return 1.f / sqrtf(mean_of(SQUARED_DEVIATION, kind, x, NULL, n, mean) + eps);
}

// out = x · scale · weight
INLINE void scale_row(enum kind kind, const void *x, const float *weight, void *out, size_t n, float scale) {
    const __m512 scales = _mm512_set1_ps(scale);
    for_each_16(i, mask, n) {
        const __m512 normed = _mm512_mul_ps(load(kind, x, i, mask), scales);
        store(kind, out, i, mask, _mm512_mul_ps(normed, load(F32, weight, i, mask)));
    }
}

// out = (x - mean) · scale · weight + bias; a bias of NULL is none
INLINE void standardise_row(enum kind kind, const void *x, const float *weight, const float *bias, void *out, size_t n,
                            float mean, float scale) {
    const __m512 means = _mm512_set1_ps(mean), scales = _mm512_set1_ps(scale);
    for_each_16(i, mask, n) {
        const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load(kind, x, i, mask), means), scales);
        const __m512 scaled = _mm512_mul_ps(normed, load(F32, weight, i, mask));
        store(kind, out, i, mask, bias ? _mm512_add_ps(scaled, load(F32, bias, i, mask)) : scaled);
    }
}
