#include "pack_linear/pack_linear.h"
#include "simd/elements.h"

// Sixteen words of a row: 32 elements as bfloat16 pairs, or 16 float32. What lies past the row's end is zero.
INLINE __m512i words_of_row(enum kind kind, enum kind panel_kind, const void *row, size_t word, size_t columns) {
    if (panel_kind == F32) return _mm512_castps_si512(load(kind, row, word, first16(columns - word)));
    const size_t i = 2 * word, left = columns - i;
    if (kind == BF16) { // a copy: through float32, denormals would be flushed
        if (left >= 32) return _mm512_loadu_si512(at(kind, row, i));
        const __m256i low = _mm256_maskz_loadu_epi16(first16(left), at(kind, row, i));
        const __m256i high =
            left > 16 ? _mm256_maskz_loadu_epi16(first16(left - 16), at(kind, row, i + 16)) : _mm256_setzero_si256();
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    const __m512 low = load(kind, row, i, first16(left));
    const __m512 high = left > 16 ? load(kind, row, i + 16, first16(left - 16)) : _mm512_setzero_ps();
    return _mm512_inserti64x4(_mm512_castsi256_si512(bits_of_bf16x16(_mm512_cvtneps_pbh(low))),
                              bits_of_bf16x16(_mm512_cvtneps_pbh(high)), 1);
}

INLINE void transpose_16x16(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

INLINE bool any_nan(enum kind panel_kind, __m512i words) {
    __m512 odd = _mm512_castsi512_ps(words);
    if (panel_kind == F32) return _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    odd = _mm512_castsi512_ps(_mm512_and_epi32(words, _mm512_set1_epi32((int)0xffff0000)));
    return _mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q);
}

INLINE void pack_panel(const struct pack_linear_args *a, size_t panel, enum kind kind, enum kind panel_kind) {
    const size_t words = panel_kind == BF16 ? (a->columns + 1) / 2 : a->columns;
    const size_t rows = a->rows - panel * 16 < 16 ? a->rows - panel * 16 : 16;
    uint32_t *out = a->panels + panel * a->panel_step;
    bool nan = false;
    for (size_t word = 0; word < words; word += 16) {
        __m512i block[16];
        for (size_t r = 0; r < 16; r++) {
            const void *row = (const char *)a->weight + (panel * 16 + r) * a->weight_stride;
            block[r] = r < rows ? words_of_row(kind, panel_kind, row, word, a->columns) : _mm512_setzero_si512();
            nan |= any_nan(panel_kind, block[r]);
        }
        transpose_16x16(block);
        const size_t count = words - word < 16 ? words - word : 16;
        for (size_t i = 0; i < count; i++) _mm512_storeu_si512(out + (word + i) * 16, block[i]);
    }
    if (nan) *a->nan_found = 1;
}

void RUNG_NAME(pack_linear)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct pack_linear_args *a = args;
    (void)scratch;
    for (size_t panel = begin; panel < end; panel++) {
        if (a->panel_kind == BF16 && a->kind == BF16)
            pack_panel(a, panel, BF16, BF16);
        else if (a->panel_kind == BF16)
            pack_panel(a, panel, F32, BF16);
        else if (a->kind == BF16)
            pack_panel(a, panel, BF16, F32);
        else
            pack_panel(a, panel, F32, F32);
    }
}
