#include "add_rms_norm/add_rms_norm.h"
#include "simd/norm.h"

INLINE void normalise_rows(const struct add_rms_norm_args *a, size_t begin, size_t end, enum kind kind) {
    for (size_t row = begin; row < end; row++) {
        const void *x = (const char *)a->x + row * a->x_stride;
        void *residual = (char *)a->residual + row * a->residual_stride;
        void *out = (char *)a->out + row * a->out_stride;
        const float scale = inverse_rms(kind, x, residual, a->hidden, a->eps);
        scale_row(kind, residual, a->weight, out, a->hidden, scale);
    }
}

void RUNG_NAME(add_rms_norm)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct add_rms_norm_args *a = args;
    (void)scratch;
    if (a->kind == BF16)
        normalise_rows(a, begin, end, BF16);
    else
        normalise_rows(a, begin, end, F32);
}
