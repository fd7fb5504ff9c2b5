#include "pack_experts/pack_experts.h"
#include "simd/simd.h"

enum { ROWS = 16, BLOCK_BYTES = 17 * 16 };

typedef uint32_t __attribute__((may_alias, aligned(1))) word;

// Every second code of eight, from the lowest bits on.
INLINE uint32_t even_codes(uint32_t x) {
    x &= 0x0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff;
    return (x | x >> 8) & 0xffff;
}

// With codes whose magnitude is below `least` as 0.
INLINE uint32_t without_small(uint32_t codes, uint32_t least) {
    uint32_t kept = 0;
    for (int i = 0; i < 32; i += 4)
        if ((codes >> i & 7) >= least) kept |= codes & 15u << i;
    return kept;
}

// With 0 for 8: one zero is enough.
INLINE uint32_t without_negative_zero(uint32_t codes) {
    const uint32_t any = codes | codes >> 1 | codes >> 2; // bit 0 of each code: whether its magnitude is not 0
    return codes & ~(0x88888888 & ~(any << 3));
}

INLINE void pack_panel(const struct pack_experts_args *a, size_t panel) {
    const size_t first = panel * ROWS, rows = a->rows - first < ROWS ? a->rows - first : ROWS;
    for (size_t block = 0; block < a->blocks; block++) {
        uint8_t *to = a->panels + panel * a->panel_step + block * BLOCK_BYTES;
        word *lines = (word *)(to + ROWS);
        for (size_t r = 0; r < ROWS; r++) {
            const bool there = r < rows;
            const uint8_t scale = there ? a->scales[(first + r) * a->scales_stride + block] : 127;
            to[r] = scale;
            for (size_t q = 0; q < 4; q++) {
                const void *from = a->codes + (first + r) * a->codes_stride + 16 * block + 4 * q;
                uint32_t codes = there ? *(const word *)from : 0;
                codes = scale < 2 ? without_small(codes, scale ? 2 : 4) : without_negative_zero(codes);
                lines[q * ROWS + r] = even_codes(codes) | even_codes(codes >> 4) << 16;
            }
        }
    }
}

void RUNG_NAME(pack_experts)(const void *args, size_t begin, size_t end, void *scratch) {
    (void)scratch;
    for (size_t panel = begin; panel < end; panel++) pack_panel(args, panel);
}
