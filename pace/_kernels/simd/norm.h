// The sums that norms share, each over one row in float32.
#pragma once
#include <math.h>
#include "elements.h"

// 1 / sqrt(mean(x²) + eps)
INLINE float inverse_rms(enum kind kind, const void *x, size_t n, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for_each_16(i, mask, n) {
        const __m512 v = load(kind, x, i, mask);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.f / sqrtf(_mm512_reduce_add_ps(sum) / (float)n + eps);
}
