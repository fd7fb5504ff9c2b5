#include "rope/rope.h"
#include "simd/elements.h"

// Steps of 16 lanes are the outer loop, heads the inner one: cos and sin stay in registers for all heads.

// Elements [i, i + 16) and [half + i, half + i + 16) of every head are 16 pairs.
INLINE void rotate_halves(enum kind kind, void *x, size_t heads, size_t head_dim, size_t half, size_t i, __mmask16 mask,
                          __m512 cos, __m512 sin) {
    for (size_t head = 0; head < heads; head++, x = at_mut(kind, x, head_dim)) {
        const __m512 x1 = load(kind, x, i, mask), x2 = load(kind, x, half + i, mask);
        store(kind, x, i, mask, _mm512_sub_ps(_mm512_mul_ps(x1, cos), _mm512_mul_ps(x2, sin)));
        store(kind, x, half + i, mask, _mm512_add_ps(_mm512_mul_ps(x2, cos), _mm512_mul_ps(x1, sin)));
    }
}

// Elements [i, i + 16) of every head are 8 pairs; cos holds each value twice, and sin the negative before it.
INLINE void rotate_neighbours(enum kind kind, void *x, size_t heads, size_t head_dim, size_t i, __mmask16 mask,
                              __m512 cos, __m512 sin) {
    for (size_t head = 0; head < heads; head++, x = at_mut(kind, x, head_dim)) {
        const __m512 v = load(kind, x, i, mask), swapped = _mm512_permute_ps(v, 0xb1);
        store(kind, x, i, mask, _mm512_add_ps(_mm512_mul_ps(v, cos), _mm512_mul_ps(swapped, sin)));
    }
}

// Eight values, each twice.
INLINE __m512 load8_twice(const float *p, __mmask8 mask) {
    const __m256i bits = _mm256_castps_si256(_mm256_maskz_loadu_ps(mask, p));
    return _mm512_moveldup_ps(_mm512_castsi512_ps(_mm512_cvtepu32_epi64(bits)));
}

INLINE void rotate_token(const struct rope_args *a, size_t token, enum kind kind, bool interleaved) {
    void *q = (char *)a->q + token * a->q_stride, *k = (char *)a->k + token * a->k_stride;
    const size_t entry = (size_t)a->positions[token] * a->half;
    const float *cos_row = a->cos + entry, *sin_row = a->sin + entry;
    if (interleaved) {
        // The sign bit of even lanes.
        const __m512 negative = _mm512_castsi512_ps(_mm512_cvtepu32_epi64(_mm256_set1_epi32((int)0x80000000)));
        for_each_16(i, mask, 2 * a->half) {
            const __mmask8 pairs = (__mmask8)first16(a->half - i / 2);
            const __m512 cos = load8_twice(cos_row + i / 2, pairs);
            const __m512 sin = _mm512_xor_ps(load8_twice(sin_row + i / 2, pairs), negative);
            rotate_neighbours(kind, q, a->heads, a->head_dim, i, mask, cos, sin);
            rotate_neighbours(kind, k, a->kv_heads, a->head_dim, i, mask, cos, sin);
        }
    } else {
        for_each_16(i, mask, a->half) {
            const __m512 cos = load(F32, cos_row, i, mask), sin = load(F32, sin_row, i, mask);
            rotate_halves(kind, q, a->heads, a->head_dim, a->half, i, mask, cos, sin);
            rotate_halves(kind, k, a->kv_heads, a->head_dim, a->half, i, mask, cos, sin);
        }
    }
}

INLINE void rotate_tokens(const struct rope_args *a, size_t begin, size_t end, enum kind kind, bool interleaved) {
    for (size_t token = begin; token < end; token++) rotate_token(a, token, kind, interleaved);
}

void RUNG_NAME(rope)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct rope_args *a = args;
    (void)scratch;
    if (a->kind == BF16 && a->interleaved)
        rotate_tokens(a, begin, end, BF16, true);
    else if (a->kind == BF16)
        rotate_tokens(a, begin, end, BF16, false);
    else if (a->interleaved)
        rotate_tokens(a, begin, end, F32, true);
    else
        rotate_tokens(a, begin, end, F32, false);
}
