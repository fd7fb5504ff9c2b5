#include "attend/attend.h"
#include "simd/math.h"
#include "store_kv/layout.h"

// Positions at which the arithmetic is cut, counted from the start of the sequence, so that an output's bits
// do not depend on who else is computed with it: the online softmax advances by STEP keys, and partial
// results of SPLIT keys are merged in order.
enum { STEP = 64, SPLIT = 512 };

// What an item is computed with; the rows are its queries' heads, row = query · group + head of the group.
struct work {
    const struct attend_args *a;
    enum kind kind;
    const int32_t *table;
    size_t head, rows, head_dim, padded_dim, q_words;
    size_t kv_length, first_position;            // of the sequence; of the item's first query
    word *q;                                     // (rows, q_words), as words of a
    float *max, *sum, *values;                   // of the split so far: (rows), (rows), (rows, padded_dim)
    float *total_max, *total_sum, *total_values; // of the splits before
    word *staged;                                // one step's V, where it can't be read in place
};

INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
INLINE __m512 minus_infinity(void) { return _mm512_set1_ps(-__builtin_inff()); }
INLINE void clear(float *x, size_t n, float value) {
    for (size_t i = 0; i < n; i += 16) _mm512_storeu_ps(x + i, _mm512_set1_ps(value));
}

INLINE const word *key_group(const struct work *w, size_t token) {
    const struct kv_blocks *b = &w->a->blocks;
    return (const word *)group_of(b, w->kind, b->k, (size_t)w->table[token / b->block_tokens], w->head,
                                  token % b->block_tokens);
}
INLINE const word *value_group(const struct work *w, size_t token) {
    const struct kv_blocks *b = &w->a->blocks;
    return (const word *)group_of(b, w->kind, b->v, (size_t)w->table[token / b->block_tokens], w->head,
                                  token % b->block_tokens);
}

// Keys that a row sees of the step: those up to its own position.
INLINE size_t visible(const struct work *w, size_t row, size_t step) {
    const size_t end = w->first_position + row / w->a->group + 1;
    return end <= step ? 0 : smaller(end - step, STEP);
}

// scores (rows, STEP) = q · Kᵀ; keys that no row sees are left out in whole groups.
INLINE void scores_of_step(const struct work *w, enum kind kind, size_t row, size_t rows, size_t step, float *scores) {
    const size_t groups = (visible(w, row + rows - 1, step) + GROUP - 1) / GROUP;
    clear(scores, rows * STEP, 0);
    for (size_t g = 0; g < groups; g += TILE_PANELS) {
        const word *k = key_group(w, step + g * GROUP);
        const bool two = TILE_PANELS == 2 && g + 1 < groups;
        const struct tile t = {
            .a = w->q + row * w->q_words,
            .a_step = 1,
            .a_row = w->q_words,
            .b = k,
            .b_step = GROUP,
            .b_panel = two ? (size_t)(key_group(w, step + (g + 1) * GROUP) - k) : 0,
            .num_words = words_of(kind, w->head_dim),
        };
        if (two)
            add_tile(kind, rows, TILE_PANELS, &t, scores + g * GROUP, STEP);
        else
            add_tile(kind, rows, 1, &t, scores + g * GROUP, STEP);
    }
}

// Sixteen numerators as words of a; bfloat16 rounds them.
INLINE void put_numerators(enum kind kind, word *to, size_t i, __m512 p) {
    if (kind == F32) _mm512_storeu_ps(to + i, p);
#if RUNG_AVX512
    else
        _mm256_storeu_si256((void *)(to + i / 2), bits_of_bf16x16(_mm512_cvtneps_pbh(p)));
#else
    else
        _mm512_storeu_ps(to + i, f32_of_bf16(bits_of_bf16x16(_mm512_cvtneps_pbh(p))));
#endif
}

// One step of the online softmax for a tile of rows: numerators from scores, and what came before rescaled to
// the new maximum.
INLINE void soften_step(const struct work *w, enum kind kind, size_t row, size_t rows, size_t step, float *scores,
                        word *numerators) {
    const __m512 scale = _mm512_set1_ps(w->a->scale);
    float new_max[16], rescale[16];
    clear(new_max, 16, -__builtin_inff());
    for (size_t r = 0; r < rows; r++) {
        const size_t seen = visible(w, row + r, step);
        __m512 max = minus_infinity();
        for (size_t i = 0; i < STEP; i += 16) {
            const __mmask16 mask = seen > i ? first16(seen - i) : 0;
            const __m512 raw = _mm512_loadu_ps(scores + r * STEP + i);
            const __m512 s = _mm512_mask_blend_ps(mask, minus_infinity(), _mm512_mul_ps(raw, scale));
            _mm512_storeu_ps(scores + r * STEP + i, s);
            max = _mm512_max_ps(s, max);
        }
        const float step_max = _mm512_reduce_max_ps(max), old = w->max[row + r];
        new_max[r] = step_max > old ? step_max : old;
    }
    // A row that has seen no key keeps a maximum of -inf; its difference would be NaN.
    float old_max[16];
    clear(old_max, 16, -__builtin_inff());
    for (size_t r = 0; r < rows; r++) old_max[r] = w->max[row + r];
    _mm512_storeu_ps(rescale, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(old_max), _mm512_loadu_ps(new_max))));

    for (size_t r = 0; r < rows; r++) {
        word *p = numerators + r * STEP;
        if (new_max[r] == -__builtin_inff()) {
            for (size_t i = 0; i < STEP; i += 16) _mm512_storeu_ps(p + i, _mm512_setzero_ps());
            continue;
        }
        __m512 sum = _mm512_setzero_ps();
        for (size_t i = 0; i < STEP; i += 16) {
            const __m512 s = _mm512_loadu_ps(scores + r * STEP + i);
            const __m512 e = exp_ps(_mm512_sub_ps(s, _mm512_set1_ps(new_max[r])));
            sum = _mm512_add_ps(sum, e);
            put_numerators(kind, p, i, e);
        }
        w->sum[row + r] = w->sum[row + r] * rescale[r] + _mm512_reduce_add_ps(sum);
        w->max[row + r] = new_max[r];
        if (rescale[r] == 1.f) continue;
        float *values = w->values + (row + r) * w->padded_dim;
        for (size_t i = 0; i < w->padded_dim; i += 16)
            _mm512_storeu_ps(values + i, _mm512_mul_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(rescale[r])));
    }
}

// V of the step's first `tokens`, filled up with zeros to whole vectors, and to whole pairs: the other half
// of the last pair is whatever the block held before.
INLINE void stage_values(const struct work *w, enum kind kind, size_t step, size_t tokens) {
    const size_t per_word = kind == BF16 ? 2 : 1;
    for (size_t token = 0; token < tokens; token += per_word) {
        const word *from = value_group(w, step + token) + token % GROUP / per_word * w->head_dim;
        word *to = w->staged + token / per_word * w->padded_dim;
        const word keep = kind == BF16 && token + 1 == tokens ? 0xffff : 0xffffffff;
        for (size_t i = 0; i < w->padded_dim; i++) to[i] = i < w->head_dim ? from[i] & keep : 0;
    }
}

// values (rows, head_dim) += numerators · V over `tokens` tokens that lie at v, one word of tokens b_step
// words apart
INLINE void accumulate_values(const struct work *w, enum kind kind, size_t row, size_t rows, const word *numerators,
                              const word *v, size_t b_step, size_t tokens) {
    struct tile t = {
        .a = numerators,
        .a_step = 1,
        .a_row = STEP,
        .b = v,
        .b_step = b_step,
        .b_panel = 16,
        .num_words = words_of(kind, tokens),
    };
    float *values = w->values + row * w->padded_dim;
    for (size_t i = 0; i < w->padded_dim; i += 16 * TILE_PANELS, t.b += 16 * TILE_PANELS) {
        if (TILE_PANELS == 2 && i + 16 < w->padded_dim)
            add_tile(kind, rows, TILE_PANELS, &t, values + i, w->padded_dim);
        else
            add_tile(kind, rows, 1, &t, values + i, w->padded_dim);
    }
}

// The splits so far and this one, each over its own maximum, as one.
INLINE void merge_split(const struct work *w) {
    for (size_t row = 0; row < w->rows; row++) {
        const float max = w->max[row] > w->total_max[row] ? w->max[row] : w->total_max[row];
        if (max == -__builtin_inff()) continue;
        float weights[16];
        clear(weights, 16, 0);
        weights[0] = w->total_max[row] - max;
        weights[1] = w->max[row] - max;
        _mm512_storeu_ps(weights, exp_ps(_mm512_loadu_ps(weights)));
        const __m512 before = _mm512_set1_ps(weights[0]), now = _mm512_set1_ps(weights[1]);
        float *total = w->total_values + row * w->padded_dim;
        const float *values = w->values + row * w->padded_dim;
        for (size_t i = 0; i < w->padded_dim; i += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(total + i), before);
            _mm512_storeu_ps(total + i, _mm512_fmadd_ps(_mm512_loadu_ps(values + i), now, scaled));
        }
        w->total_sum[row] = w->total_sum[row] * weights[0] + w->sum[row] * weights[1];
        w->total_max[row] = max;
    }
}

INLINE void begin_split(const struct work *w) {
    clear(w->max, w->rows, -__builtin_inff());
    clear(w->sum, w->rows, 0);
    clear(w->values, w->rows * w->padded_dim, 0);
}

// Asks for the keys and values of a step while the one before is computed. The CPU's own prefetching loses the thread
// where groups of keys and of values alternate: a decode over a long context waited for memory half of its time.
INLINE void fetch_ahead(const struct work *w, enum kind kind, size_t step, size_t end) {
    const size_t bytes = GROUP * w->head_dim * bytes_of(kind);
    for (size_t token = step; token < smaller(step + STEP, end); token += GROUP) {
        const char *k = (const char *)key_group(w, token), *v = (const char *)value_group(w, token);
        for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(k + i, _MM_HINT_T1);
        for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(v + i, _MM_HINT_T1);
    }
}

INLINE void attend_step(const struct work *w, enum kind kind, size_t step) {
    const size_t tokens = smaller(w->kv_length - step, STEP);
    const bool staged = w->head_dim != w->padded_dim || (kind == BF16 && tokens % 2);
    if (staged) stage_values(w, kind, step, tokens);
    float scores[TILE_ROWS * STEP];
    word numerators[TILE_ROWS * STEP];
    for (size_t row = 0; row < w->rows; row += TILE_ROWS) {
        const size_t rows = smaller(w->rows - row, TILE_ROWS);
        if (visible(w, row + rows - 1, step) == 0) continue;
        scores_of_step(w, kind, row, rows, step, scores);
        soften_step(w, kind, row, rows, step, scores, numerators);
        if (staged) {
            accumulate_values(w, kind, row, rows, numerators, w->staged, w->padded_dim, tokens);
            continue;
        }
        const size_t a_words = a_words_of(kind, GROUP);
        for (size_t token = 0; token < tokens; token += GROUP)
            accumulate_values(w, kind, row, rows, numerators + token / GROUP * a_words, value_group(w, step + token),
                              w->head_dim, smaller(tokens - token, GROUP));
    }
}

INLINE void write_rows(const struct work *w, enum kind kind, size_t first_query) {
    const size_t group = w->a->group, heads = w->a->blocks.kv_heads * group;
    for (size_t row = 0; row < w->rows; row++) {
        const size_t token = first_query + row / group, head = w->head * group + row % group;
        void *out = at_mut(kind, w->a->out, (token * heads + head) * w->head_dim);
        const __m512 inverse = _mm512_set1_ps(1.f / w->total_sum[row]);
        for_each_16(i, mask, w->head_dim) {
            const __m512 total = _mm512_loadu_ps(w->total_values + row * w->padded_dim + i);
            store(kind, out, i, mask, _mm512_mul_ps(total, inverse));
        }
    }
}

INLINE void lay_out(struct work *w, void *scratch) {
    const size_t rows = (w->rows + 15) / 16 * 16;
    float *next = scratch;
#define TAKE(n) (next += (n), next - (n))
    w->max = TAKE(rows);
    w->sum = TAKE(rows);
    w->total_max = TAKE(rows);
    w->total_sum = TAKE(rows);
    w->values = TAKE(rows * w->padded_dim);
    w->total_values = TAKE(rows * w->padded_dim);
    w->q = (word *)TAKE(rows * w->padded_dim);
    w->staged = (word *)TAKE(STEP * w->padded_dim);
#undef TAKE
}

INLINE void attend_item(const struct attend_args *a, enum kind kind, const struct attend_item *item, void *scratch) {
    const size_t s = (size_t)item->sequence, num_queries = (size_t)item->num_queries;
    const size_t first_query = (size_t)item->first_query, head_dim = a->blocks.head_dim;
    struct work w = {
        .a = a,
        .kind = kind,
        .table = a->block_tables + s * a->table_stride,
        .head = (size_t)item->head,
        .rows = num_queries * a->group,
        .head_dim = head_dim,
        .padded_dim = (head_dim + 15) / 16 * 16,
        .q_words = a_words_of(kind, head_dim),
        .kv_length = (size_t)a->kv_lengths[s],
    };
    w.first_position = w.kv_length - (size_t)a->query_starts[s + 1] + first_query;
    lay_out(&w, scratch);
    for (size_t row = 0; row < w.rows; row++) {
        const char *token = (const char *)a->q + (first_query + row / a->group) * a->q_stride;
        put_a(kind, w.q + row * w.q_words, 1, at(kind, token, (w.head * a->group + row % a->group) * head_dim),
              head_dim);
    }
    clear(w.total_max, w.rows, -__builtin_inff());
    clear(w.total_sum, w.rows, 0);
    clear(w.total_values, w.rows * w.padded_dim, 0);
    const size_t end = w.first_position + num_queries;
    for (size_t split = 0; split < end; split += SPLIT) {
        begin_split(&w);
        for (size_t step = split; step < smaller(end, split + SPLIT); step += STEP) {
            fetch_ahead(&w, kind, step + STEP, end);
            attend_step(&w, kind, step);
        }
        merge_split(&w);
    }
    write_rows(&w, kind, first_query);
}

void RUNG_NAME(attend)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct attend_args *a = args;
    for (size_t i = begin; i < end; i++) {
        if (a->blocks.kind == BF16)
            attend_item(a, BF16, &a->items[i], scratch);
        else
            attend_item(a, F32, &a->items[i], scratch);
    }
}
