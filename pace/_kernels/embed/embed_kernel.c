#include "embed/embed.h"
#include "simd/tile.h"

INLINE void scale_row(enum kind kind, void *row, size_t hidden, float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    for_each_16(i, mask, hidden) store(kind, row, i, mask, _mm512_mul_ps(load(kind, row, i, mask), factor));
}

// One row of a panel is every sixteenth word: a cache line is read for each word, whatever the vector width.
void RUNG_NAME(embed)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct embed_args *a = args;
    const size_t words = words_of(a->kind, a->hidden), whole = a->kind == BF16 ? a->hidden / 2 : a->hidden;
    (void)scratch;
    for (size_t i = begin; i < end; i++) {
        const size_t token = (size_t)a->tokens[i];
        const word *row = a->panels + token / 16 * words * 16 + token % 16;
        void *out = (char *)a->out + i * a->out_stride;
        for (size_t w = 0; w < whole; w++) ((word *)out)[w] = row[w * 16];
        if (whole < words) ((bf16_bits *)out)[a->hidden - 1] = (bf16_bits)row[whole * 16];
        if (a->scale == 1.0f) continue;
        if (a->kind == BF16)
            scale_row(BF16, out, a->hidden, a->scale);
        else
            scale_row(F32, out, a->hidden, a->scale);
    }
}
