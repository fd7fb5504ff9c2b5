// Where a token of a head stands in the blocks.
#pragma once
#include "simd/tile.h"
#include "store_kv/store_kv.h"

enum { GROUP = 16 }; // tokens

// The group of 16 tokens that holds token `offset` of a block, for one head: `which` is k or v.
INLINE char *group_of(const struct kv_blocks *b, enum kind kind, void *which, size_t block, size_t head,
                      size_t offset) {
    const size_t first = (block * b->kv_heads + head) * b->block_tokens + offset / GROUP * GROUP;
    return (char *)which + first * b->head_dim * bytes_of(kind);
}
