#include "softmax/softmax.h"
#include <math.h>
#include "simd/elements.h"
#include "simd/math.h"

// scale · x; what is not there is -infinity
INLINE __m512 scaled(enum kind kind, const void *x, size_t i, __mmask16 mask, __m512 scale) {
    const __m512 v = _mm512_mul_ps(load(kind, x, i, mask), scale);
    return mask == FULL ? v : _mm512_mask_blend_ps(mask, _mm512_set1_ps(-INFINITY), v);
}

INLINE void softmax_row(enum kind kind, const void *x, void *out, size_t n, float scale) {
    const __m512 scales = _mm512_set1_ps(scale);
    __m512 largest = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
    for_each_16(i, mask, n) largest = _mm512_max_ps(largest, scaled(kind, x, i, mask, scales));
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for_each_16(i, mask, n) {
        const __m512 power = exp_ps(_mm512_sub_ps(scaled(kind, x, i, mask, scales), most));
        sums = _mm512_add_ps(sums, mask == FULL ? power : _mm512_maskz_mov_ps(mask, power));
    }
    const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(sums));
    for_each_16(i, mask, n) {
        const __m512 power = exp_ps(_mm512_sub_ps(scaled(kind, x, i, mask, scales), most));
        store(kind, out, i, mask, _mm512_div_ps(power, sum));
    }
}

void RUNG_NAME(softmax)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct softmax_args *a = args;
    (void)scratch;
    for (size_t row = begin; row < end; row++) {
        const void *x = (const char *)a->x + row * a->x_stride;
        void *out = (char *)a->out + row * a->out_stride;
        if (a->kind == BF16)
            softmax_row(BF16, x, out, a->columns, a->scale);
        else
            softmax_row(F32, x, out, a->columns, a->scale);
    }
}
