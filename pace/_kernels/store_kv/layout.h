// Where a token of a head stands in the blocks.
#pragma once
#include "simd/tile.h"
#include "store_kv/store_kv.h"

enum { GROUP = 16 }; // tokens

// The group of 16 tokens that holds token `offset` of a block, for one head; `base` is k or v, with its strides.
INLINE void *group_of(const void *base, const ptrdiff_t *strides, size_t block, size_t head, size_t offset) {
    const ptrdiff_t at = (ptrdiff_t)block * strides[0] + (ptrdiff_t)head * strides[1];
    return (char *)base + at + (ptrdiff_t)(offset / GROUP) * strides[2];
}
