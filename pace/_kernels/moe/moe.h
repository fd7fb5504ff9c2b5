#pragma once
#include <stddef.h>
#include <stdint.h>

// Columns of an item, and rows of a unit, a multiple of every rung's tile: all of them share a panel once it is unpacked.
enum { ITEM_PANELS = 4, ROWS_PER_UNIT = 120 };
// Blocks of 32 k that are unpacked at a time: four panels of them, 32 KiB of bfloat16, stay in the caches next to the core.
enum { CHUNK_BLOCKS = 8 };
enum { MOE_UNPACKED_WORDS = ITEM_PANELS * CHUNK_BLOCKS * 32 * 16, MOE_SUMS = ROWS_PER_UNIT * ITEM_PANELS * 16 };

// Neighbours in the order of `places` that go to one expert.
struct moe_unit {
    size_t expert, first, rows;
};

struct moe_weight {
    const void *panels;
    size_t panel_bytes, num_panels; // of one expert
    size_t in_features, out_features;
    int is_mxfp4;
    const float *bias; // (experts, panels' features); or NULL
};

// A place is one token's place with one expert, token · k + rank.
struct moe_args {
    const void *x;
    size_t x_stride; // strides are in bytes from one row to the next
    int kind;        // of x and out
    size_t tokens, k;
    const uint32_t *places; // (tokens · k), by expert
    const struct moe_unit *units;
    struct moe_weight gate_up, down;
    float alpha, limit;
    uint32_t *a, *inner; // x, and what the gated MLPs give, in the order of places, as the tiles want them
    float *answers;      // (tokens · k, hidden)
    const float *weights;
    size_t weights_stride;
    void *out;
    size_t out_stride;
};

// Items are units: lays their x out in a.
void moe_arrange_avx2(const void *args, size_t begin, size_t end, void *scratch);
void moe_arrange_avx512(const void *args, size_t begin, size_t end, void *scratch);
// Items are units times fours of panels of gate_up, then of down.
void moe_gate_up_avx2(const void *args, size_t begin, size_t end, void *scratch);
void moe_gate_up_avx512(const void *args, size_t begin, size_t end, void *scratch);
void moe_down_avx2(const void *args, size_t begin, size_t end, void *scratch);
void moe_down_avx512(const void *args, size_t begin, size_t end, void *scratch);
// Items are tokens.
void moe_combine_avx2(const void *args, size_t begin, size_t end, void *scratch);
void moe_combine_avx512(const void *args, size_t begin, size_t end, void *scratch);
