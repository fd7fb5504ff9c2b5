#include "activate/activate.h"
#include "simd/activation.h"
#include "simd/elements.h"

INLINE void activate_row(enum kind kind, enum activation activation, const struct activate_args *a, size_t row) {
    const void *x = (const char *)a->x + row * a->x_stride;
    const void *factors = a->multiply ? (const char *)a->multiply + row * a->multiply_stride : NULL;
    void *out = (char *)a->out + row * a->out_stride;
    for_each_16(i, mask, a->columns) {
        __m512 y = activate(activation, load(kind, x, i, mask));
        if (factors) y = _mm512_mul_ps(y, load(kind, factors, i, mask));
        store(kind, out, i, mask, y);
    }
}

INLINE void activate_rows(enum kind kind, const struct activate_args *a, size_t begin, size_t end) {
    for (size_t row = begin; row < end; row++) switch (a->activation) {
        case RELU:
            activate_row(kind, RELU, a, row);
            break;
        case GELU_ERF:
            activate_row(kind, GELU_ERF, a, row);
            break;
        case GELU_TANH:
            activate_row(kind, GELU_TANH, a, row);
            break;
        default:
            activate_row(kind, SILU, a, row);
        }
}

void RUNG_NAME(activate)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct activate_args *a = args;
    (void)scratch;
    if (a->kind == BF16)
        activate_rows(BF16, a, begin, end);
    else
        activate_rows(F32, a, begin, end);
}
