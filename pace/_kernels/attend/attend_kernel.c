#include "attend/attend.h"
#include "simd/math.h"
#include "store_kv/layout.h"

#define LOG2_E 1.44269504f

// Sums of a softmax so far, each row's over its own maximum, which is in units of log2: (rows), (rows),
// (rows, padded_dim).
struct state {
    float *max, *sum, *values;
};

// What an item is computed with; the rows are its queries' heads, row = query · group + head of the group.
struct work {
    const struct attend_args *a;
    enum kind kind;
    const int32_t *table;
    size_t head, rows, tile_rows, head_dim, padded_dim, q_words;
    size_t kv_length;
    float scale, cap;             // of scores; cap is 0 for none
    size_t end;                   // of the keys that its rows see, all together
    int32_t *row_begin, *row_end; // the keys that each sees
    word *q;                      // of each tile (q_words, rows), as words of a
    struct state total, block;    // of the splits so far, all rows; of a split, a block's rows
    word *staged;                 // one step's V, where it can't be read in place
};

// Keys and values are asked for so many tokens before they are read, a line at a time among the products: the CPU's own
// prefetching loses the thread where groups of keys and of values alternate, and drops what is asked for in one burst.
enum { FETCH_AHEAD = 4 * STEP };

// A tile's rows, and the keys that they see.
struct rows {
    size_t first, count, begin, end;
};

#define APART static __attribute__((noinline))

INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
INLINE size_t larger(size_t a, size_t b) { return a > b ? a : b; }
INLINE __m512 minus_infinity(void) { return _mm512_set1_ps(-__builtin_inff()); }
INLINE void clear(float *x, size_t n, float value) {
    for (size_t i = 0; i < n; i += 16) _mm512_storeu_ps(x + i, _mm512_set1_ps(value));
}
INLINE float exp2_of(float x) { return _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(x))); }

INLINE const word *key_group(const struct work *w, size_t token) {
    const struct kv_blocks *b = &w->a->blocks;
    return group_of(b->k, b->k_strides, (size_t)w->table[token / b->block_tokens], w->head, token % b->block_tokens);
}
INLINE const word *value_group(const struct work *w, size_t token) {
    const struct kv_blocks *b = &w->a->blocks;
    return group_of(b->v, b->v_strides, (size_t)w->table[token / b->block_tokens], w->head, token % b->block_tokens);
}

// Bytes from the group that holds `token` to the one that will be read FETCH_AHEAD tokens later; 0 where an earlier tile
// of the item has had it read.
typedef const word *group_at(const struct work *w, size_t token);
INLINE ptrdiff_t ahead_of(const struct work *w, const struct rows *r, group_at *group, size_t token) {
    if (r->first > 0 || token + FETCH_AHEAD >= w->end) return 0;
    return (const char *)group(w, token + FETCH_AHEAD) - (const char *)group(w, token);
}

// Whether the groups of a step lie end to end, so that it is one run of words.
INLINE bool is_one_run(const struct work *w, const ptrdiff_t *strides, size_t step) {
    const struct kv_blocks *b = &w->a->blocks;
    const size_t group_bytes = GROUP * w->head_dim * bytes_of(w->kind);
    return step % b->block_tokens + STEP <= b->block_tokens && strides[2] == (ptrdiff_t)group_bytes;
}

static const int32_t NO_SPAN[2] = {0, 0};

INLINE void find_keys(struct work *w, size_t first_query, size_t first_position) {
    const struct attend_args *a = w->a;
    w->end = 0;
    for (size_t row = 0; row < w->rows; row++) {
        const size_t query = row / a->group;
        size_t end = first_position + query + 1, begin = end > a->window ? end - a->window : 0;
        const int32_t *span = a->spans ? a->spans + 2 * (first_query + query) : NO_SPAN;
        if (span[0] < span[1]) {
            begin = smaller(begin, (size_t)span[0]);
            end = larger(end, (size_t)span[1]);
        }
        w->row_begin[row] = (int32_t)begin;
        w->row_end[row] = (int32_t)end;
        w->end = larger(w->end, end);
    }
}

// As many as fill their registers, but no tile much fuller than another: one of few rows waits for its own sums.
INLINE size_t tile_rows_of(size_t rows) {
    const size_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return (rows + tiles - 1) / tiles;
}

INLINE struct rows rows_from(const struct work *w, size_t first) {
    struct rows r = {first, smaller(w->rows - first, w->tile_rows), SIZE_MAX, 0};
    for (size_t i = first; i < first + r.count; i++) {
        r.begin = smaller(r.begin, (size_t)w->row_begin[i]);
        r.end = larger(r.end, (size_t)w->row_end[i]);
    }
    return r;
}

// scores (rows, STEP) = q · Kᵀ, of the groups of 16 keys [group, end_group) of the step
INLINE void scores_of_kind(const struct work *w, enum kind kind, const bool FETCH, const struct rows *r, size_t step,
                           size_t group, size_t end_group, float *scores) {
    struct tile t = {
        .a = w->q + r->first * w->q_words,
        .a_step = r->count,
        .a_row = 1,
        .b_step = GROUP,
        .fetch.step = LINE,
        .num_words = words_of(kind, w->head_dim),
    };
    if (r->count == 1 && end_group - group == ONE_ROW_PANELS && is_one_run(w, w->a->blocks.k_strides, step)) {
        t.b = key_group(w, step);
        t.b_panel = GROUP * t.num_words;
        t.fetch.ahead = ahead_of(w, r, key_group, step);
        sum_tile_of(kind, true, FETCH, 1, ONE_ROW_PANELS, &t, scores, STEP);
        return;
    }
    for (; group < end_group; group += 2) {
        t.b = key_group(w, step + group * GROUP);
        t.fetch.ahead = ahead_of(w, r, key_group, step + group * GROUP);
        const bool two = group + 1 < end_group;
        if (two) t.b_panel = (size_t)(key_group(w, step + (group + 1) * GROUP) - t.b);
        for (int panel = 0; panel < (two ? 2 : 1); panel += TILE_PANELS, t.b += t.b_panel) {
            float *to = scores + (group + (size_t)panel) * GROUP;
            if (TILE_PANELS == 2 && two)
                sum_tile(kind, true, FETCH, r->count, TILE_PANELS, &t, to, STEP);
            else
                sum_tile(kind, true, FETCH, r->count, 1, &t, to, STEP);
        }
    }
}

// Apart from its caller, whose variables would take the tile's registers.
APART void scores_of_step(const struct work *w, const struct rows *r, size_t step, size_t group, size_t end_group,
                          float *scores) {
    const bool fetch = r->first == 0; // later tiles find them in the cache
    if (w->kind == BF16 && fetch)
        scores_of_kind(w, BF16, true, r, step, group, end_group, scores);
    else if (w->kind == BF16)
        scores_of_kind(w, BF16, false, r, step, group, end_group, scores);
    else if (fetch)
        scores_of_kind(w, F32, true, r, step, group, end_group, scores);
    else
        scores_of_kind(w, F32, false, r, step, group, end_group, scores);
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

// Lanes of the 16 keys from `key` on that lie in [begin, end).
INLINE __mmask16 lanes(size_t begin, size_t end, size_t key) {
    const __mmask16 before = end > key ? first16(end - key) : 0;
    return before & (__mmask16) ~(begin > key ? first16(begin - key) : 0);
}

// Sixteen scores of a row as the softmax takes them, times log2(e); of keys that it does not see, -inf.
INLINE __m512 adjusted(const struct work *w, size_t row, size_t key, __m512 raw) {
    __m512 s = _mm512_mul_ps(raw, _mm512_set1_ps(w->scale));
    if (w->cap != 0) s = _mm512_mul_ps(_mm512_set1_ps(w->cap), tanh_ps(s));
    const __mmask16 seen = lanes((size_t)w->row_begin[row], (size_t)w->row_end[row], key);
    return _mm512_mask_blend_ps(seen, minus_infinity(), s);
}

// One step of the online softmax for a row: numerators from scores, of the groups [group, end_group), and what came
// before rescaled to the new maximum. PLAIN: of all groups, all keys seen, no cap.
INLINE void soften(const struct work *w, enum kind kind, const bool PLAIN, size_t row, const struct state *state,
                   size_t i, size_t step, size_t group, size_t end_group, const float *scores, word *numerators) {
    __m512 s[STEP / GROUP], largest = minus_infinity();
#pragma GCC unroll 4
    for (size_t g = 0; g < STEP / GROUP; g++) {
        if (!PLAIN && (g < group || g >= end_group)) continue;
        const __m512 raw = _mm512_loadu_ps(scores + g * GROUP);
        s[g] = PLAIN ? _mm512_mul_ps(raw, _mm512_set1_ps(w->scale)) : adjusted(w, row, step + g * GROUP, raw);
        largest = _mm512_max_ps(s[g], largest);
    }
    const float before = state->max[i], here = _mm512_reduce_max_ps(largest), max = here > before ? here : before;
    // A row that has seen no key keeps a maximum of -inf; its differences would be NaN.
    const __m512 maximum = _mm512_set1_ps(max == -__builtin_inff() ? 0 : max);
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (size_t g = 0; g < STEP / GROUP; g++) {
        if (!PLAIN && (g < group || g >= end_group)) continue;
        const __m512 e = exp2_ps(_mm512_sub_ps(s[g], maximum));
        sum = _mm512_add_ps(sum, e);
        put_numerators(kind, numerators, g * GROUP, e);
    }
    if (max == before) {
        state->sum[i] += _mm512_reduce_add_ps(sum);
        return;
    }
    const float rescale = exp2_of(before - max);
    state->sum[i] = state->sum[i] * rescale + _mm512_reduce_add_ps(sum);
    state->max[i] = max;
    float *values = state->values + i * w->padded_dim;
    for (size_t d = 0; d < w->padded_dim; d += 16)
        _mm512_storeu_ps(values + d, _mm512_mul_ps(_mm512_loadu_ps(values + d), _mm512_set1_ps(rescale)));
}

// V of the tokens [begin, end) of the step, filled up with zeros to whole vectors, and to whole pairs: the other half
// of the last pair is whatever the block held before.
INLINE void stage_values(const struct work *w, enum kind kind, size_t step, size_t begin, size_t end) {
    const size_t per_word = kind == BF16 ? 2 : 1;
    for (size_t token = begin; token < end; token += per_word) {
        const word *from = value_group(w, step + token) + token % GROUP / per_word * w->head_dim;
        word *to = w->staged + token / per_word * w->padded_dim;
        const word keep = kind == BF16 && token + 1 == end ? 0xffff : 0xffffffff;
        for (size_t i = 0; i < w->padded_dim; i++) to[i] = i < w->head_dim ? from[i] & keep : 0;
    }
}

// values (rows, head_dim) += numerators · V, of the tokens that t tells
INLINE void values_of_kind(enum kind kind, const bool FETCH, size_t rows, struct tile t, float *values,
                           size_t padded_dim) {
    size_t i = 0;
    if (rows == 1)
        for (; i + 16 * ONE_ROW_PANELS <= padded_dim; i += 16 * ONE_ROW_PANELS, t.b += 16 * ONE_ROW_PANELS)
            sum_tile_of(kind, false, FETCH, 1, ONE_ROW_PANELS, &t, values + i, padded_dim);
    for (; i < padded_dim; i += 16 * TILE_PANELS, t.b += 16 * TILE_PANELS) {
        if (TILE_PANELS == 2 && i + 16 < padded_dim)
            sum_tile(kind, false, FETCH, rows, TILE_PANELS, &t, values + i, padded_dim);
        else
            sum_tile(kind, false, FETCH, rows, 1, &t, values + i, padded_dim);
    }
}

// The same, of `tokens` tokens that lie at v, one word of tokens b_step words apart.
APART void add_values(const struct work *w, const struct rows *r, const struct state *s, const word *numerators,
                      const word *v, size_t b_step, size_t tokens, ptrdiff_t ahead) {
    const struct tile t = {
        .a = numerators,
        .a_step = 1,
        .a_row = STEP,
        .b = v,
        .b_step = b_step,
        .b_panel = 16,
        .num_words = words_of(w->kind, tokens),
        .fetch = {ahead, b_step * sizeof(word)},
    };
    if (w->kind == BF16 && ahead)
        values_of_kind(BF16, true, r->count, t, s->values, w->padded_dim);
    else if (w->kind == BF16)
        values_of_kind(BF16, false, r->count, t, s->values, w->padded_dim);
    else if (ahead)
        values_of_kind(F32, true, r->count, t, s->values, w->padded_dim);
    else
        values_of_kind(F32, false, r->count, t, s->values, w->padded_dim);
}

INLINE void attend_step(const struct work *w, enum kind kind, const struct rows *r, const struct state *s,
                        size_t step) {
    const size_t seen = smaller(r->end - step, STEP), group = r->begin > step ? (r->begin - step) / GROUP : 0;
    const size_t end_group = (seen + GROUP - 1) / GROUP, first = group * GROUP;
    const size_t tokens = smaller(end_group * GROUP, w->kv_length - step); // of the last group, those that there are
    float scores[TILE_ROWS * STEP];
    word numerators[TILE_ROWS * STEP];
    scores_of_step(w, r, step, group, end_group, scores);
    for (size_t i = 0; i < r->count; i++) {
        const size_t row = r->first + i;
        const bool all = (size_t)w->row_begin[row] <= step && (size_t)w->row_end[row] >= step + STEP;
        if (all && w->cap == 0)
            soften(w, kind, true, row, s, i, step, 0, STEP / GROUP, scores + i * STEP, numerators + i * STEP);
        else
            soften(w, kind, false, row, s, i, step, group, end_group, scores + i * STEP, numerators + i * STEP);
    }
    const word *from = numerators + group * a_words_of(kind, GROUP);
    if (w->head_dim != w->padded_dim || (kind == BF16 && tokens % 2)) {
        stage_values(w, kind, step, first, tokens);
        const word *v = w->staged + words_of(kind, first) * w->padded_dim;
        add_values(w, r, s, from, v, w->padded_dim, tokens - first, 0);
    } else if (is_one_run(w, w->a->blocks.v_strides, step)) {
        const word *v = value_group(w, step + first);
        add_values(w, r, s, from, v, w->head_dim, tokens - first, ahead_of(w, r, value_group, step + first));
    } else {
        for (size_t token = first; token < tokens; token += GROUP, from += a_words_of(kind, GROUP))
            add_values(w, r, s, from, value_group(w, step + token), w->head_dim, smaller(tokens - token, GROUP),
                       ahead_of(w, r, value_group, step + token));
    }
}

INLINE void begin_state(const struct work *w, const struct state *s, size_t rows) {
    for (size_t i = 0; i < rows; i++) s->max[i] = -__builtin_inff(), s->sum[i] = 0;
    clear(s->values, rows * w->padded_dim, 0);
}

INLINE struct state state_from(const struct work *w, struct state s, size_t row) {
    return (struct state){s.max + row, s.sum + row, s.values + row * w->padded_dim};
}

INLINE struct state state_at(float *memory, size_t rows) {
    const size_t padded = attend_padded(rows);
    return (struct state){memory, memory + padded, memory + 2 * padded};
}

// The splits so far and this one, each over its own maximum, as one.
INLINE void merge_split(const struct work *w, struct state total, struct state split, size_t rows) {
    for (size_t row = 0; row < rows; row++) {
        const float max = split.max[row] > total.max[row] ? split.max[row] : total.max[row];
        if (max == -__builtin_inff()) continue;
        const float before = exp2_of(total.max[row] - max), now = exp2_of(split.max[row] - max);
        float *sums = total.values + row * w->padded_dim;
        const float *values = split.values + row * w->padded_dim;
        for (size_t i = 0; i < w->padded_dim; i += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(sums + i), _mm512_set1_ps(before));
            _mm512_storeu_ps(sums + i, _mm512_fmadd_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(now), scaled));
        }
        total.sum[row] = total.sum[row] * before + split.sum[row] * now;
        total.max[row] = max;
    }
}

INLINE void write_rows(const struct work *w, enum kind kind, size_t first_query) {
    const size_t group = w->a->group, heads = w->a->blocks.kv_heads * group;
    for (size_t row = 0; row < w->rows; row++) {
        const size_t token = first_query + row / group, head = w->head * group + row % group;
        float sum = w->total.sum[row], weight = 1;
        if (w->a->sinks) { // a last split of one key without a value
            const float sink = w->a->sinks[head] * LOG2_E, seen = w->total.max[row], max = sink > seen ? sink : seen;
            weight = exp2_of(seen - max);
            sum = sum * weight + exp2_of(sink - max);
        }
        void *out = at_mut(kind, w->a->out, (token * heads + head) * w->head_dim);
        const __m512 inverse = _mm512_set1_ps(weight / sum);
        for_each_16(i, mask, w->head_dim) {
            const __m512 total = _mm512_loadu_ps(w->total.values + row * w->padded_dim + i);
            store(kind, out, i, mask, _mm512_mul_ps(total, inverse));
        }
    }
}

INLINE void lay_out(struct work *w, void *scratch) {
    const size_t rows = attend_padded(w->rows);
    float *next = scratch;
#define TAKE(n) (next += (n), next - (n))
    w->row_begin = (int32_t *)TAKE(rows);
    w->row_end = (int32_t *)TAKE(rows);
    w->q = (word *)TAKE(rows * w->padded_dim);
    w->total = state_at(TAKE(attend_state_floats(w->rows, w->head_dim)), w->rows);
    w->block = state_at(TAKE(attend_state_floats(BLOCK_ROWS, w->head_dim)), BLOCK_ROWS);
    w->staged = (word *)TAKE(STEP * w->padded_dim);
#undef TAKE
}

// A tile's rows stand word by word beside each other.
INLINE void put_queries(const struct work *w, enum kind kind, size_t first_query) {
    const struct attend_args *a = w->a;
    for (size_t row = 0; row < w->rows; row++) {
        const size_t first = row - row % w->tile_rows, count = smaller(w->rows - first, w->tile_rows);
        const char *token = (const char *)a->q + (first_query + row / a->group) * a->q_stride;
        put_a(kind, w->q + first * w->q_words + row - first, count,
              at(kind, token, (w->head * a->group + row % a->group) * w->head_dim), w->head_dim);
    }
}

// Some tiles' rows, from the first on, over the keys of a split: step by step, so that a step's keys and values stay in
// the innermost cache while the tiles take turns.
INLINE void attend_split(const struct work *w, enum kind kind, size_t first, size_t count, const struct state *s,
                         size_t split) {
    struct rows tiles[BLOCK_ROWS];
    size_t num_tiles = 0, begin = SIZE_MAX, end = 0;
    for (size_t row = first; row < first + count; row += w->tile_rows) {
        const struct rows r = tiles[num_tiles++] = rows_from(w, row);
        begin = smaller(begin, r.begin);
        end = larger(end, r.end);
    }
    begin_state(w, s, count);
    for (size_t step = larger(split, begin / STEP * STEP); step < smaller(end, split + SPLIT); step += STEP)
        for (size_t i = 0; i < num_tiles; i++) {
            const struct rows *r = &tiles[i];
            const struct state tile = state_from(w, *s, r->first - first);
            if (r->begin < step + STEP && r->end > step) attend_step(w, kind, r, &tile, step);
        }
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
        .padded_dim = attend_padded(head_dim),
        .q_words = a_words_of(kind, head_dim),
        .kv_length = (size_t)a->kv_lengths[s],
        .scale = a->softcap == 0 ? a->scale * LOG2_E : a->scale / a->softcap,
        .cap = a->softcap * LOG2_E,
    };
    w.tile_rows = tile_rows_of(w.rows);
    lay_out(&w, scratch);
    find_keys(&w, first_query, w.kv_length - (size_t)a->query_starts[s + 1] + first_query);
    put_queries(&w, kind, first_query);
    const size_t state_floats = attend_state_floats(w.rows, head_dim);
    begin_state(&w, &w.total, w.rows);
    const size_t block_rows = BLOCK_ROWS / w.tile_rows * w.tile_rows;
    for (size_t split = (size_t)item->begin_split; split < (size_t)item->end_split; split++) {
        for (size_t row = 0; row < w.rows; row += block_rows) {
            const size_t count = smaller(w.rows - row, block_rows);
            if (item->num_splits) {
                float *memory = item->partials + (split - (size_t)item->first_split) * state_floats;
                const struct state block = state_from(&w, state_at(memory, w.rows), row);
                attend_split(&w, kind, row, count, &block, split * SPLIT);
            } else {
                attend_split(&w, kind, row, count, &w.block, split * SPLIT);
                merge_split(&w, state_from(&w, w.total, row), w.block, count);
            }
        }
    }
    if (item->num_splits) {
        if (__atomic_sub_fetch(item->unfinished, 1, __ATOMIC_ACQ_REL)) return;
        for (size_t split = 0; split < (size_t)item->num_splits; split++)
            merge_split(&w, w.total, state_at(item->partials + split * state_floats, w.rows), w.rows);
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
