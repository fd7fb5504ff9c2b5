#include "roofline/roofline.h"
#include "simd/simd.h"

// The rung's own registers, not pairs of them: twelve pairs would not fit AVX2's sixteen.
#if RUNG_AVX512
typedef __m512 vector;
#define vector_load  _mm512_loadu_ps
#define vector_store _mm512_storeu_ps
#define vector_set1  _mm512_set1_ps
#define vector_add   _mm512_add_ps
#define vector_fmadd _mm512_fmadd_ps
#else
typedef __m256 vector;
#define vector_load  _mm256_loadu_ps
#define vector_store _mm256_storeu_ps
#define vector_set1  _mm256_set1_ps
#define vector_add   _mm256_add_ps
#define vector_fmadd _mm256_fmadd_ps
#endif
enum { LANES = sizeof(vector) / sizeof(float), LOADS = 8 };

// Stretches of memory that a thread reads side by side (31.6 GB/s of one Zen 4 core where one gives 26.5), and bytes that
// are asked for before they are read (37 GB/s of two Xeon cores where 35 come without).
enum { STREAMS = 4, AHEAD = 2048 };

#define EACH(j, n) _Pragma("GCC unroll 16") for (int j = 0; j < (n); j++)

INLINE float any_of(const vector *sums, int n) {
    vector total = sums[0];
    for (int j = 1; j < n; j++) total = vector_add(total, sums[j]);
    return ((const float *)&total)[0];
}

void RUNG_NAME(roofline_touch)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct roofline_args *a = args;
    (void)scratch;
    float *const first = (float *)(a->buffer + begin * ROOFLINE_BLOCK_BYTES);
    float *const last = (float *)(a->buffer + end * ROOFLINE_BLOCK_BYTES);
    for (float *p = first; p < last; p += LANES) vector_store(p, vector_set1(1.f));
}

// `streams` stretches of `bytes` each, one after the other in memory, read side by side.
INLINE float sum_of_streams(const char *first, size_t bytes, int streams) {
    vector sums[LOADS];
    EACH(j, LOADS) sums[j] = vector_set1(0.f);
    for (size_t i = 0; i < bytes; i += LOADS * sizeof(vector))
        for (int s = 0; s < streams; s++) {
            const float *p = (const float *)(first + s * bytes + i);
            if (streams > 1) EACH(j, LOADS) _mm_prefetch((const char *)(p + j * LANES) + AHEAD, _MM_HINT_T1);
            EACH(j, LOADS) sums[j] = vector_add(sums[j], vector_load(p + j * LANES));
        }
    return any_of(sums, LOADS);
}

void RUNG_NAME(roofline_read)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct roofline_args *a = args;
    (void)scratch;
    const size_t stretch = (end - begin) / STREAMS, rest = begin + stretch * STREAMS;
    const char *first = a->buffer + begin * ROOFLINE_BLOCK_BYTES;
    a->sink[begin] = sum_of_streams(first, stretch * ROOFLINE_BLOCK_BYTES, STREAMS);
    for (size_t item = rest; item < end; item++)
        a->sink[item] = sum_of_streams(a->buffer + item * ROOFLINE_BLOCK_BYTES, ROOFLINE_BLOCK_BYTES, 1);
}

// Each chain starts elsewhere, or a compiler could see that they are all one.
#define CHAINS_OF(seed, sums, multiply_add)                                                                            \
    vector sums[ROOFLINE_CHAINS];                                                                                      \
    EACH(j, ROOFLINE_CHAINS) sums[j] = vector_load(seed + 16 * (j + 2));                                               \
    for (int step = 0; step < ROOFLINE_STEPS; step++) EACH(j, ROOFLINE_CHAINS) sums[j] = multiply_add;

void RUNG_NAME(roofline_fma)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct roofline_args *a = args;
    (void)scratch;
    const vector x = vector_load(a->seed), y = vector_load(a->seed + 16);
    for (size_t item = begin; item < end; item++) {
        CHAINS_OF(a->seed, sums, vector_fmadd(sums[j], x, y))
        a->sink[item] = any_of(sums, ROOFLINE_CHAINS);
    }
}

#if RUNG_AVX512
void RUNG_NAME(roofline_dot)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct roofline_args *a = args;
    (void)scratch;
    const __m512bh x = as_bf16x32(_mm512_loadu_si512(a->seed)), y = as_bf16x32(_mm512_loadu_si512(a->seed + 16));
    for (size_t item = begin; item < end; item++) {
        CHAINS_OF(a->seed, sums, _mm512_dpbf16_ps(sums[j], x, y))
        a->sink[item] = any_of(sums, ROOFLINE_CHAINS);
    }
}
#endif
