// AVX-512 intrinsics on AVX2, FMA and F16C: each 512-bit register is a pair of 256-bit ones. Only what the
// kernels use is here. Meaning and rounding are the instruction's; lanes that are masked off are never
// touched in memory.
#pragma once
#include <immintrin.h>
#include <string.h>

typedef struct {
    __m256 half[2];
} pair_ps;
typedef struct {
    __m256i half[2];
} pair_epi;
typedef struct {
    __m256d half[2];
} pair_pd;

#define __m512   pair_ps
#define __m512d  pair_pd
#define __m512i  pair_epi
#define __m512bh pair_epi
#define __m256bh __m256i

INLINE pair_epi as_bf16x32(pair_epi x) { return x; }
INLINE __m256i bits_of_bf16x16(__m256i x) { return x; }

#define EACH_PS(name, expression)                                                                                      \
    INLINE pair_ps name(pair_ps a, pair_ps b) {                                                                        \
        pair_ps r;                                                                                                     \
        for (int i = 0; i < 2; i++) {                                                                                  \
            const __m256 x = a.half[i], y = b.half[i];                                                                 \
            r.half[i] = expression;                                                                                    \
        }                                                                                                              \
        return r;                                                                                                      \
    }
#define EACH_EPI(name, expression)                                                                                     \
    INLINE pair_epi name(pair_epi a, pair_epi b) {                                                                     \
        pair_epi r;                                                                                                    \
        for (int i = 0; i < 2; i++) {                                                                                  \
            const __m256i x = a.half[i], y = b.half[i];                                                                \
            r.half[i] = expression;                                                                                    \
        }                                                                                                              \
        return r;                                                                                                      \
    }

EACH_PS(pair_add_ps, _mm256_add_ps(x, y))
EACH_PS(pair_sub_ps, _mm256_sub_ps(x, y))
EACH_PS(pair_mul_ps, _mm256_mul_ps(x, y))
EACH_PS(pair_div_ps, _mm256_div_ps(x, y))
EACH_PS(pair_max_ps, _mm256_max_ps(x, y))
EACH_PS(pair_min_ps, _mm256_min_ps(x, y))
EACH_PS(pair_xor_ps, _mm256_xor_ps(x, y))
EACH_EPI(pair_add_epi32, _mm256_add_epi32(x, y))
EACH_EPI(pair_sub_epi32, _mm256_sub_epi32(x, y))
EACH_EPI(pair_and_epi32, _mm256_and_si256(x, y))
EACH_EPI(pair_or_epi32, _mm256_or_si256(x, y))
EACH_EPI(pair_unpacklo_epi32, _mm256_unpacklo_epi32(x, y))
EACH_EPI(pair_unpackhi_epi32, _mm256_unpackhi_epi32(x, y))
EACH_EPI(pair_unpacklo_epi64, _mm256_unpacklo_epi64(x, y))
EACH_EPI(pair_unpackhi_epi64, _mm256_unpackhi_epi64(x, y))
#define _mm512_unpacklo_epi32 pair_unpacklo_epi32
#define _mm512_unpackhi_epi32 pair_unpackhi_epi32
#define _mm512_unpacklo_epi64 pair_unpacklo_epi64
#define _mm512_unpackhi_epi64 pair_unpackhi_epi64
#define _mm512_add_ps         pair_add_ps
#define _mm512_sub_ps         pair_sub_ps
#define _mm512_mul_ps         pair_mul_ps
#define _mm512_div_ps         pair_div_ps
#define _mm512_max_ps         pair_max_ps
#define _mm512_min_ps         pair_min_ps
#define _mm512_xor_ps         pair_xor_ps
#define _mm512_add_epi32      pair_add_epi32
#define _mm512_sub_epi32      pair_sub_epi32
#define _mm512_and_epi32      pair_and_epi32
#define _mm512_or_epi32       pair_or_epi32

INLINE pair_ps pair_fmadd_ps(pair_ps a, pair_ps b, pair_ps c) {
    return (pair_ps){
        {_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
}
INLINE pair_ps pair_fnmadd_ps(pair_ps a, pair_ps b, pair_ps c) {
    return (pair_ps){
        {_mm256_fnmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fnmadd_ps(a.half[1], b.half[1], c.half[1])}};
}
#define _mm512_fmadd_ps  pair_fmadd_ps
#define _mm512_fnmadd_ps pair_fnmadd_ps

INLINE pair_ps pair_set1_ps(float x) { return (pair_ps){{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
INLINE pair_epi pair_set1_epi32(int x) { return (pair_epi){{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
INLINE pair_ps pair_setzero_ps(void) { return (pair_ps){{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
INLINE pair_epi pair_setzero_si512(void) { return (pair_epi){{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
INLINE pair_ps pair_castsi512_ps(pair_epi a) {
    return (pair_ps){{_mm256_castsi256_ps(a.half[0]), _mm256_castsi256_ps(a.half[1])}};
}
INLINE pair_epi pair_castps_si512(pair_ps a) {
    return (pair_epi){{_mm256_castps_si256(a.half[0]), _mm256_castps_si256(a.half[1])}};
}
#define _mm512_set1_ps       pair_set1_ps
#define _mm512_set1_epi32    pair_set1_epi32
#define _mm512_setzero_ps    pair_setzero_ps
#define _mm512_setzero_si512 pair_setzero_si512
#define _mm512_castsi512_ps  pair_castsi512_ps
#define _mm512_castps_si512  pair_castps_si512

// Loads and stores.

INLINE pair_ps pair_loadu_ps(const void *p) {
    return (pair_ps){{_mm256_loadu_ps((const float *)p), _mm256_loadu_ps((const float *)p + 8)}};
}
INLINE void pair_storeu_ps(void *p, pair_ps a) {
    _mm256_storeu_ps((float *)p, a.half[0]);
    _mm256_storeu_ps((float *)p + 8, a.half[1]);
}
INLINE pair_epi pair_loadu_si512(const void *p) {
    return (pair_epi){{_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)}};
}
INLINE void pair_storeu_si512(void *p, pair_epi a) {
    _mm256_storeu_si256((__m256i *)p, a.half[0]);
    _mm256_storeu_si256((__m256i *)p + 1, a.half[1]);
}
// Eight mask bits as eight lanes of all ones or all zeros.
INLINE __m256i lanes_of_mask(unsigned mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bit), bit);
}
INLINE pair_ps pair_maskz_loadu_ps(__mmask16 m, const void *p) {
    return (pair_ps){{_mm256_maskload_ps((const float *)p, lanes_of_mask(m)),
                      _mm256_maskload_ps((const float *)p + 8, lanes_of_mask(m >> 8))}};
}
INLINE void pair_mask_storeu_ps(void *p, __mmask16 m, pair_ps a) {
    _mm256_maskstore_ps((float *)p, lanes_of_mask(m), a.half[0]);
    _mm256_maskstore_ps((float *)p + 8, lanes_of_mask(m >> 8), a.half[1]);
}
// AVX2 has no 16-bit masked access: a partial row end goes element by element.
INLINE __m256i pair256_maskz_loadu_epi16(__mmask16 m, const void *p) {
    uint16_t lane[16] = {0};
    for (int i = 0; i < 16; i++)
        if (m >> i & 1) lane[i] = ((const uint16_t *)p)[i];
    return _mm256_loadu_si256((const __m256i *)lane);
}
INLINE void pair256_mask_storeu_epi16(void *p, __mmask16 m, __m256i a) {
    uint16_t lane[16];
    _mm256_storeu_si256((__m256i *)lane, a);
    for (int i = 0; i < 16; i++)
        if (m >> i & 1) ((uint16_t *)p)[i] = lane[i];
}
#define _mm256_maskz_loadu_ps(m, p) _mm256_maskload_ps(p, lanes_of_mask(m))
#define _mm512_loadu_ps             pair_loadu_ps
#define _mm512_storeu_ps            pair_storeu_ps
#define _mm512_loadu_si512          pair_loadu_si512
#define _mm512_storeu_si512         pair_storeu_si512
#define _mm512_maskz_loadu_ps       pair_maskz_loadu_ps
#define _mm512_mask_storeu_ps       pair_mask_storeu_ps
#define _mm256_maskz_loadu_epi16    pair256_maskz_loadu_epi16
#define _mm256_mask_storeu_epi16    pair256_mask_storeu_epi16

// Masks.

INLINE pair_ps pair_mask_blend_ps(__mmask16 m, pair_ps a, pair_ps b) {
    return (pair_ps){{_mm256_blendv_ps(a.half[0], b.half[0], _mm256_castsi256_ps(lanes_of_mask(m))),
                      _mm256_blendv_ps(a.half[1], b.half[1], _mm256_castsi256_ps(lanes_of_mask(m >> 8)))}};
}
#define _mm512_mask_blend_ps      pair_mask_blend_ps
#define _mm512_maskz_mov_ps(m, a) pair_mask_blend_ps(m, pair_setzero_ps(), a)
// `predicate` must be a compile-time constant, as for the instruction.
#define _mm512_cmp_ps_mask(a, b, predicate)                                                                            \
    ((__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps((a).half[0], (b).half[0], predicate)) |                              \
                 _mm256_movemask_ps(_mm256_cmp_ps((a).half[1], (b).half[1], predicate)) << 8))

// Within pairs of lanes.

INLINE pair_ps pair_moveldup_ps(pair_ps a) {
    return (pair_ps){{_mm256_moveldup_ps(a.half[0]), _mm256_moveldup_ps(a.half[1])}};
}
#define _mm512_moveldup_ps pair_moveldup_ps
#define _mm512_permute_ps(a, control)                                                                                  \
    ((pair_ps){{_mm256_permute_ps((a).half[0], control), _mm256_permute_ps((a).half[1], control)}})

INLINE float pair_cvtss_f32(pair_ps a) { return _mm256_cvtss_f32(a.half[0]); }
#define _mm512_cvtss_f32 pair_cvtss_f32

// Reductions, in the order of gcc's own expansion: halves, quarters, pairs.

INLINE float pair_reduce_add_ps(pair_ps a) {
    const __m256 x = _mm256_add_ps(a.half[0], a.half[1]);
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE float pair_reduce_max_ps(pair_ps a) {
    const __m256 x = _mm256_max_ps(a.half[0], a.half[1]);
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
#define _mm512_reduce_add_ps pair_reduce_add_ps
#define _mm512_reduce_max_ps pair_reduce_max_ps

// Float64: sums of many small float32.

INLINE pair_pd pair_setzero_pd(void) { return (pair_pd){{_mm256_setzero_pd(), _mm256_setzero_pd()}}; }
INLINE pair_pd pair_add_pd(pair_pd a, pair_pd b) {
    return (pair_pd){{_mm256_add_pd(a.half[0], b.half[0]), _mm256_add_pd(a.half[1], b.half[1])}};
}
INLINE pair_pd pair_cvtps_pd(__m256 a) {
    return (pair_pd){{_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))}};
}
INLINE double pair_reduce_add_pd(pair_pd a) {
    const __m256d x = _mm256_add_pd(a.half[0], a.half[1]);
    const __m128d y = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(y, _mm_unpackhi_pd(y, y)));
}
#define _mm512_setzero_pd            pair_setzero_pd
#define _mm512_add_pd                pair_add_pd
#define _mm512_cvtps_pd              pair_cvtps_pd
#define _mm512_reduce_add_pd         pair_reduce_add_pd
#define _mm512_castps512_ps256(a)    ((a).half[0])
#define _mm512_extractf32x8_ps(a, i) ((a).half[i])

// Lane by lane: AVX2 has no compress, and to read the lanes back as a vector would stall.
typedef uint32_t __attribute__((may_alias)) any32;
INLINE size_t compress_epi32(void *p, __mmask16 m, pair_epi a) {
    any32 lane[16], *to = p;
    pair_storeu_si512(lane, a);
    for (unsigned left = m; left; left &= left - 1) *to++ = lane[__builtin_ctz(left)];
    return (size_t)(to - (any32 *)p);
}
INLINE size_t compress_ps(void *p, __mmask16 m, pair_ps a) { return compress_epi32(p, m, pair_castps_si512(a)); }

// Integers and conversions.

#define _mm512_slli_epi32(a, n) ((pair_epi){{_mm256_slli_epi32((a).half[0], n), _mm256_slli_epi32((a).half[1], n)}})
INLINE pair_epi pair_cvtepu16_epi32(__m256i a) {
    return (pair_epi){
        {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))}};
}
INLINE pair_epi pair_cvtepu32_epi64(__m256i a) {
    return (pair_epi){
        {_mm256_cvtepu32_epi64(_mm256_castsi256_si128(a)), _mm256_cvtepu32_epi64(_mm256_extracti128_si256(a, 1))}};
}
INLINE pair_epi pair_cvtepu8_epi32(__m128i a) {
    return (pair_epi){{_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))}};
}
#define _mm512_cvtepu8_epi32  pair_cvtepu8_epi32
#define _mm512_cvtepu16_epi32 pair_cvtepu16_epi32
#define _mm512_cvtepu32_epi64 pair_cvtepu32_epi64
INLINE pair_epi pair_castsi256_si512(__m256i a) { return (pair_epi){{a, a}}; }
#define _mm512_castsi256_si512(a)       pair_castsi256_si512(a)
#define _mm512_inserti64x4(a, b, half_) ((pair_epi){{(half_) ? (a).half[0] : (b), (half_) ? (b) : (a).half[1]}})

// The four quarters a[m0] a[m1] b[m2] b[m3] of 128 bits.
#define QUARTER(x, i)                                                                                                  \
    ((i) & 1 ? _mm256_extracti128_si256((x).half[(i) >> 1], 1) : _mm256_castsi256_si128((x).half[(i) >> 1]))
#define _mm512_shuffle_i32x4(a, b, m)                                                                                  \
    ((pair_epi){{_mm256_set_m128i(QUARTER(a, (m) >> 2 & 3), QUARTER(a, (m) & 3)),                                      \
                 _mm256_set_m128i(QUARTER(b, (m) >> 6 & 3), QUARTER(b, (m) >> 4 & 3))}})

// float32 to bfloat16: round to nearest even; a NaN stays one (its quiet bit is set).
INLINE __m256i bf16_in_low_half(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
INLINE __m256i pair_cvtneps_pbh(pair_ps a) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_in_low_half(a.half[0]), bf16_in_low_half(a.half[1])),
                                    0xd8);
}
#define _mm512_cvtneps_pbh pair_cvtneps_pbh

// c + a·b over pairs of bfloat16: even element first, then odd, each fused.
INLINE pair_ps pair_dpbf16_ps(pair_ps c, pair_epi a, pair_epi b) {
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    pair_ps r;
    for (int i = 0; i < 2; i++) {
        const __m256 even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a.half[i], 16)),
                                            _mm256_castsi256_ps(_mm256_slli_epi32(b.half[i], 16)), c.half[i]);
        r.half[i] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a.half[i], odd)),
                                    _mm256_castsi256_ps(_mm256_and_si256(b.half[i], odd)), even);
    }
    return r;
}
#define _mm512_dpbf16_ps pair_dpbf16_ps

#define _mm512_roundscale_ps(a, mode)                                                                                  \
    ((pair_ps){{_mm256_round_ps((a).half[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),                           \
                _mm256_round_ps((a).half[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}})

// x·2^n for integral n, in two steps of half the exponent each so that results may be denormal.
INLINE __m256 scalef_half(__m256 x, __m256 n) {
    const __m256i bias = _mm256_set1_epi32(127);
    n = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-252.f)), _mm256_set1_ps(254.f));
    const __m256i whole = _mm256_cvtps_epi32(n), low = _mm256_srai_epi32(whole, 1);
    const __m256i high = _mm256_sub_epi32(whole, low);
    x = _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(low, bias), 23)));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(high, bias), 23)));
}
INLINE pair_ps pair_scalef_ps(pair_ps a, pair_ps n) {
    return (pair_ps){{scalef_half(a.half[0], n.half[0]), scalef_half(a.half[1], n.half[1])}};
}
#define _mm512_scalef_ps pair_scalef_ps

// p·2^n for p near 1 and integral n from -125 to 125, added to the exponent; 0 where x < least.
INLINE pair_ps scale_from(float least, pair_ps x, pair_ps p, pair_ps n) {
    pair_ps r;
    for (int i = 0; i < 2; i++) {
        const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n.half[i]), 23);
        const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.half[i]), exponent));
        r.half[i] = _mm256_and_ps(scaled, _mm256_cmp_ps(x.half[i], _mm256_set1_ps(least), _CMP_NLT_UQ));
    }
    return r;
}

// bfloat16 of E2M1 times 2^(125 - s): codes are bits 4·n … 4·n + 3 of each 16-bit lane, and 8, the negative zero, is none
// of them; `exponents` is s · 2^7, and leaves all values normal. The table has them at 2^125: a zero that the exponent is
// taken from stays one, as the subtraction saturates.
INLINE __m256i scaled_e2m1(__m256i codes, __m256i exponents) {
    // The low bytes of eight magnitudes, then their high bytes: the two bytes of a lane look up a half each.
    const __m256i bytes = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -0x80, 0, 0x40, -0x80, -0x40, 0, 0x40, 0, 0x7d, 0x7e, 0x7e, 0x7e, 0x7e, 0x7f, 0x7f));
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi16(7));
    const __m256i both = _mm256_or_si256(low, _mm256_slli_epi16(_mm256_or_si256(low, _mm256_set1_epi16(8)), 8));
    const __m256i magnitude = _mm256_subs_epu16(_mm256_shuffle_epi8(bytes, both), exponents);
    return _mm256_or_si256(magnitude, _mm256_and_si256(_mm256_slli_epi16(codes, 12), _mm256_set1_epi16((short)0x8000)));
}
INLINE pair_epi bf16_of_e2m1(pair_epi codes, int n, pair_epi exponents) {
    return (pair_epi){{scaled_e2m1(_mm256_srli_epi16(codes.half[0], 4 * n), exponents.half[0]),
                       scaled_e2m1(_mm256_srli_epi16(codes.half[1], 4 * n), exponents.half[1])}};
}
