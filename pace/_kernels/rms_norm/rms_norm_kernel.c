#include "rms_norm/rms_norm.h"
#include "simd/norm.h"

INLINE void normalise_rows(const struct rms_norm_args *a, size_t begin, size_t end, enum kind kind) {
    for (size_t row = begin; row < end; row++) {
        const void *x = (const char *)a->x + row * a->x_stride;
        void *out = (char *)a->out + row * a->out_stride;
        const __m512 scale = _mm512_set1_ps(inverse_rms(kind, x, a->hidden, a->eps));
        for_each_16(i, mask, a->hidden) {
            const __m512 normed = _mm512_mul_ps(load(kind, x, i, mask), scale);
            store(kind, out, i, mask, _mm512_mul_ps(normed, load(F32, a->weight, i, mask)));
        }
    }
}

void RUNG_NAME(rms_norm)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct rms_norm_args *a = args;
    (void)scratch;
    if (a->kind == BF16)
        normalise_rows(a, begin, end, BF16);
    else
        normalise_rows(a, begin, end, F32);
}
