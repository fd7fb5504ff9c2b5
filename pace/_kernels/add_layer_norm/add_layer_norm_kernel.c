#include "add_layer_norm/add_layer_norm.h"
#include "simd/norm.h"

INLINE void normalise_rows(const struct add_layer_norm_args *a, size_t begin, size_t end, enum kind kind) {
    for (size_t row = begin; row < end; row++) {
        const void *x = (const char *)a->x + row * a->x_stride;
        void *residual = (char *)a->residual + row * a->residual_stride;
        void *out = (char *)a->out + row * a->out_stride;
        const float mean = mean_of(VALUE, kind, x, residual, a->hidden, 0.f);
        const float scale = inverse_deviation(kind, residual, a->hidden, mean, a->eps);
        standardise_row(kind, residual, a->weight, a->bias, out, a->hidden, mean, scale);
    }
}

void RUNG_NAME(add_layer_norm)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct add_layer_norm_args *a = args;
    (void)scratch;
    if (a->kind == BF16)
        normalise_rows(a, begin, end, BF16);
    else
        normalise_rows(a, begin, end, F32);
}
