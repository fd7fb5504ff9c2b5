#include "route/route.h"
#include "simd/elements.h"
#include "simd/math.h"

// Puts a logit among the best so far, after those that are at least as large; NaN after all.
INLINE size_t insert(float logit, int32_t expert, size_t count, size_t k, float *best, int32_t *chosen) {
    size_t i = count;
    while (i > 0 && (logit > best[i - 1] || (best[i - 1] != best[i - 1] && logit == logit))) i--;
    if (i == k) return count;
    for (size_t j = count < k ? count : k - 1; j > i; j--) {
        best[j] = best[j - 1];
        chosen[j] = chosen[j - 1];
    }
    best[i] = logit;
    chosen[i] = expert;
    return count < k ? count + 1 : k;
}

// The softmax of k logits, the largest first, in place; added in ascending order.
INLINE void softmax(float *x, size_t k) {
    const __m512 largest = _mm512_set1_ps(x[0]);
    for_each_16(i, mask, k) store(F32, x, i, mask, exp_ps(_mm512_sub_ps(load(F32, x, i, mask), largest)));
    float sum = 0;
    for (size_t i = 0; i < k; i++) sum += x[i];
    for_each_16(i, mask, k) store(F32, x, i, mask, _mm512_div_ps(load(F32, x, i, mask), _mm512_set1_ps(sum)));
}

void RUNG_NAME(route)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct route_args *a = args;
    (void)scratch;
    for (size_t token = begin; token < end; token++) {
        const float *logits = (const float *)((const char *)a->logits + token * a->logits_stride);
        float *weights = a->weights + token * a->k;
        int32_t *chosen = a->chosen + token * a->k;
        size_t count = 0;
        for (size_t expert = 0; expert < a->experts; expert++)
            count = insert(logits[expert], (int32_t)expert, count, a->k, weights, chosen);
        softmax(weights, a->k);
    }
}
