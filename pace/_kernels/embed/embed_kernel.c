#include "embed/embed.h"
#include "simd/tile.h"

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
    }
}
