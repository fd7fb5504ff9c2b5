// What this machine can do at most: bytes read from memory, and multiply-adds on registers alone. Not an
// operation: it has no twin, and its results mean nothing but that the work was done.
#pragma once
#include <stddef.h>

enum {
    ROOFLINE_BLOCK_BYTES = 1 << 16, // an item of touch and read
    ROOFLINE_CHAINS = 12,           // sums in flight, in registers: covers latency × issue width up to Zen 5
    ROOFLINE_STEPS = 1 << 13,       // an item of fma and dot: this many instructions of each chain
};

struct roofline_args {
    char *buffer;      // touch and read: items × ROOFLINE_BLOCK_BYTES
    const float *seed; // fma and dot: ROOFLINE_CHAINS + 2 different vectors of 16 floats
    float *sink;       // one per item: what keeps a compiler from dropping the work
};

void roofline_touch_avx2(const void *args, size_t begin, size_t end, void *scratch);
void roofline_touch_avx512(const void *args, size_t begin, size_t end, void *scratch);
void roofline_read_avx2(const void *args, size_t begin, size_t end, void *scratch);
void roofline_read_avx512(const void *args, size_t begin, size_t end, void *scratch);
void roofline_fma_avx2(const void *args, size_t begin, size_t end, void *scratch);
void roofline_fma_avx512(const void *args, size_t begin, size_t end, void *scratch);
void roofline_dot_avx512(const void *args, size_t begin, size_t end, void *scratch); // avx2 has none: use fma
