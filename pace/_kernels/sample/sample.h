#pragma once
#include <stddef.h>
#include <stdint.h>

// A row of SAMPLING_DTYPE.
struct sampling {
    float temperature;
    int32_t top_k;
    float top_p, min_p, typical_p;
    float repetition_penalty, frequency_penalty, presence_penalty;
};

struct sample_args {
    const void *logits;
    size_t stride; // bytes from one row to the next
    size_t vocab;
    const struct sampling *params;
    const double *uniforms; // NULL where every row is greedy

    // Ragged: row r's are [starts[r], starts[r + 1]). NULL where there are none.
    const int32_t *history_ids, *history_counts;
    const int64_t *history_starts;
    const int32_t *bias_ids;
    const float *bias_values;
    const int64_t *bias_starts;

    const void *allowed; // a bit a token, in rows of uint32_t; NULL where there are none
    size_t allowed_stride;
    const int32_t *given; // -1 where the row draws; NULL where all do

    int32_t *tokens;

    // NULL where no log-probabilities are asked for. What is written is x - max x: the binding, which has a
    // logarithm, takes log(masses) off.
    float *logprobs;
    int32_t *ranks;
    double *masses;
    int32_t *top_tokens; // num_top a row
    float *top_logprobs;
    size_t num_top;
};

// The scratch of a thread, in bytes.
static inline size_t sample_scratch_bytes(size_t vocab) {
    enum { VECTORS = 10, PAD = 64, BUCKETS = 2048 };
    return VECTORS * sizeof(float) * (vocab / PAD + 2) * PAD + BUCKETS * sizeof(double);
}

void sample_avx2(const void *args, size_t begin, size_t end, void *scratch);
void sample_avx512(const void *args, size_t begin, size_t end, void *scratch);
