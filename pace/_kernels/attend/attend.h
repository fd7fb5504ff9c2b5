#pragma once
#include "store_kv/store_kv.h"

// Positions at which the arithmetic is cut, counted from the start of the sequence, so that an output's bits do not
// depend on who else is computed with it: the online softmax advances by STEP keys, and partial results of SPLIT keys
// are merged in order.
enum { STEP = 64, SPLIT = 512 };

// Rows whose tiles take turns at each step: their sums stay in the cache beside its keys and values.
enum { BLOCK_ROWS = 48 };

// One kv head's part of a run of a sequence's new tokens, and of their keys those of the splits [begin, end). Where
// other items have the rest of the keys, each leaves what its splits come to, and the one that ends last merges all.
struct attend_item {
    int32_t sequence, head;
    int32_t first_query, num_queries; // among all tokens
    int32_t begin_split, end_split;
    int32_t first_split, num_splits; // of all these items; num_splits is 0 where there is one
    int32_t *unfinished;             // of them
    float *partials;                 // (num_splits, attend_state_floats)
};

struct attend_args {
    struct kv_blocks blocks;
    const void *q;
    size_t q_stride; // bytes from one token to the next
    size_t group;    // query heads of a kv head
    const int32_t *block_tables, *query_starts, *kv_lengths;
    size_t table_stride; // blocks from one sequence's table to the next
    float scale;
    size_t window;        // at most so many keys, the query's own included; SIZE_MAX for all
    float softcap;        // 0 for none
    const float *sinks;   // (heads), or NULL
    const int32_t *spans; // (tokens, 2), or NULL
    void *out;            // (tokens, heads, head_dim)
    const struct attend_item *items;
};

static inline size_t attend_padded(size_t n) { return (n + 15) / 16 * 16; }

// A maximum, a sum and a weighted sum of values, for each of so many rows (queries times group).
static inline size_t attend_state_floats(size_t rows, size_t head_dim) {
    return attend_padded(rows) * (2 + attend_padded(head_dim));
}

// Scratch for items of `rows` rows: the keys that each sees, its query, its state; the state of a block of rows; a
// step's values.
static inline size_t attend_scratch_bytes(size_t rows, size_t head_dim) {
    const size_t padded_dim = attend_padded(head_dim);
    const size_t floats = attend_padded(rows) * (2 + padded_dim) + attend_state_floats(rows, head_dim);
    return sizeof(float) * (floats + attend_state_floats(BLOCK_ROWS, head_dim) + STEP * padded_dim);
}

// Items are attend_items.
void attend_avx2(const void *args, size_t begin, size_t end, void *scratch);
void attend_avx512(const void *args, size_t begin, size_t end, void *scratch);
