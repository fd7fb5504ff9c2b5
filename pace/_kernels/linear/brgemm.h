// Batch-reduce products by kernels that a library has made at run time, in place of our tiles (pace.ops.backends.tpp):
// sums (rows, 16) of a panel and some rows of x, the features in blocks and what is left of them.
#pragma once
#include <stddef.h>

// libxsmm 1 takes plain arguments, and 2 a struct of pointers.
typedef void brgemm_1(const void *panel, const void *x, float *sums, const unsigned long long *count);
struct brgemm_operands {
    const void *op[4], *a[6], *b[6];
    void *c[6];
};
typedef void brgemm_2(const struct brgemm_operands *operands);

struct brgemm {
    int api;
    unsigned long long count;        // blocks
    size_t panel_bytes, x_bytes;     // of all blocks, where what is left begins
    const void *blocks[2], *left[2]; // kernels for ROWS_PER_BLOCK rows, and for those after; NULL where there are none
};

static inline void brgemm_call(const struct brgemm *g, const void *kernel, const void *panel, const void *x,
                               float *sums) {
    if (g->api == 1) {
        ((brgemm_1 *)kernel)(panel, x, sums, &g->count);
        return;
    }
    const struct brgemm_operands operands = {.op[2] = &g->count, .a[0] = panel, .b[0] = x, .c[0] = sums};
    ((brgemm_2 *)kernel)(&operands);
}

static inline void brgemm(const struct brgemm *g, int whole, const void *panel, const void *x, float *sums) {
    const void *blocks = g->blocks[!whole], *left = g->left[!whole];
    if (blocks) brgemm_call(g, blocks, panel, x, sums);
    if (left) brgemm_call(g, left, (const char *)panel + g->panel_bytes, (const char *)x + g->x_bytes, sums);
}
