#include "linear/product.h"

// act(gate + bias) · (up + bias), and the one rounding; the biases are gate's, then up's
static void finish_gated(const struct linear_args *a, size_t row, size_t pair, const float *sums) {
    const size_t column = pair * 16;
    const __mmask16 mask = first16(a->out_features - column);
    __m512 gate = _mm512_loadu_ps(sums), up = _mm512_loadu_ps(sums + 16);
    if (a->bias) {
        gate = _mm512_add_ps(gate, load(F32, a->bias, column, mask));
        up = _mm512_add_ps(up, load(F32, a->bias, a->out_features + column, mask));
    }
    const __m512 product = _mm512_mul_ps(activate(a->activation, gate), up);
    void *out = (char *)a->out + row * a->out_stride;
    if (a->out_kind == BF16)
        store(BF16, out, column, mask, product);
    else
        store(F32, out, column, mask, product);
}

void RUNG_NAME(gated_mlp)(const void *args, size_t begin, size_t end, void *scratch) {
    (void)scratch;
    product(args, begin, end, finish_gated);
}
