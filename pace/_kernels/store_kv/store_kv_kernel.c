#include "store_kv/layout.h"

INLINE void store_token(const struct store_kv_args *a, size_t token, enum kind kind) {
    const struct kv_blocks *b = &a->blocks;
    const size_t slot = (size_t)a->slots[token], head_dim = b->head_dim;
    const size_t block = slot / b->block_tokens, offset = slot % b->block_tokens, lane = offset % GROUP;
    const char *k = (const char *)a->k + token * a->k_stride, *v = (const char *)a->v + token * a->v_stride;
    for (size_t head = 0; head < b->kv_heads; head++) {
        void *k_group = group_of(b->k, b->k_strides, block, head, offset);
        void *v_group = group_of(b->v, b->v_strides, block, head, offset);
        const size_t first = head * head_dim;
        if (kind == BF16) {
            const word *pairs = (const word *)at(BF16, k, first);
            for (size_t i = 0; i < head_dim / 2; i++) ((word *)k_group)[i * GROUP + lane] = pairs[i];
            const bf16_bits *from = at(BF16, v, first);
            bf16_bits *to = (bf16_bits *)v_group + lane / 2 * head_dim * 2 + lane % 2;
            for (size_t i = 0; i < head_dim; i++) to[2 * i] = from[i];
        } else {
            const word *keys = at(F32, k, first), *values = at(F32, v, first);
            for (size_t i = 0; i < head_dim; i++) ((word *)k_group)[i * GROUP + lane] = keys[i];
            for (size_t i = 0; i < head_dim; i++) ((word *)v_group)[lane * head_dim + i] = values[i];
        }
    }
}

void RUNG_NAME(store_kv)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct store_kv_args *a = args;
    (void)scratch;
    for (size_t token = begin; token < end; token++) {
        if (a->blocks.kind == BF16)
            store_token(a, token, BF16);
        else
            store_token(a, token, F32);
    }
}
