#pragma once
#include "store_kv/store_kv.h"

// One head group of a run of a sequence's new tokens: small enough that its queries and sums stay in the L2
// cache.
struct attend_item {
    int32_t sequence, head;
    int32_t first_query, num_queries; // among all tokens
};

struct attend_args {
    struct kv_blocks blocks;
    const void *q;
    size_t q_stride; // bytes from one token to the next
    size_t group;    // query heads of a kv head
    const int32_t *block_tables, *query_starts, *kv_lengths;
    size_t table_stride; // blocks from one sequence's table to the next
    float scale;
    void *out; // (tokens, heads, head_dim)
    const struct attend_item *items;
};

// Rows (queries times group) of one item, at most; except that an item has at least one query.
enum { ROWS_PER_ITEM = 48 };

// Scratch for items of `rows` rows: four floats of state a row; its query, two sums; and a step's values.
static inline size_t attend_scratch_bytes(size_t rows, size_t head_dim) {
    const size_t padded_rows = (rows + 15) / 16 * 16, padded_dim = (head_dim + 15) / 16 * 16;
    return sizeof(float) * (padded_rows * (4 + 3 * padded_dim) + 64 * padded_dim);
}

// Items are attend_items.
void attend_avx2(const void *args, size_t begin, size_t end, void *scratch);
void attend_avx512(const void *args, size_t begin, size_t end, void *scratch);
