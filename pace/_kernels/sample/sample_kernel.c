// No pass sorts the vocabulary. A pass over the logits finds their maximum and that of small groups of them;
// the k-th largest of those is a bound that leaves little more than k candidates for top-k, and their share
// of the mass one that leaves the candidates for top-p. Both cut the candidates by one radix select on the
// order of the logits, in which a token weighs 1 or its mass; typical-p does the same with the order of the
// shifts. A mask that forbids any token leaves a list of the others, and all that follows is for those only.
#include "sample/sample.h"
#include "simd/elements.h"
#include "simd/math.h"

enum {
    BLOCK = 1024, // logits whose largest, lane by lane, and whose mass are kept
    LANES = 16,
    DIGIT = 11, // bits of the key that a level of the radix select looks at
    BUCKETS = 1 << DIGIT,
};

// Tokens in ascending order of id; without `ids`, those of a row.
struct tokens {
    const float *z;
    float *w;
    const int32_t *ids;
    size_t n;
};

// Where tokens are put: those of a row, or fewer of its own.
struct list {
    float *z, *w;
    int32_t *ids;
    size_t n;
};

struct workspace {
    float *z, *w; // of the vocabulary
    struct list list;
    uint32_t *keys;
    float *weights;
    uint64_t *order;
    float *maxima;  // LANES a block
    double *masses; // one a block
    double *histogram;
};

static struct workspace workspace_in(void *scratch, size_t vocab) {
    const size_t padded = (vocab / 64 + 2) * 64, blocks = vocab / BLOCK + 1;
    float *at = scratch;
    struct workspace s = {.z = at, .w = at + padded};
    s.list = (struct list){.z = at + 2 * padded, .w = at + 3 * padded, .ids = (int32_t *)(at + 4 * padded)};
    s.keys = (uint32_t *)(at + 5 * padded);
    s.weights = at + 6 * padded;
    s.order = (uint64_t *)(at + 7 * padded);
    s.maxima = at + 9 * padded;
    s.masses = (double *)(s.maxima + LANES * blocks);
    s.histogram = (double *)(at + 10 * padded);
    return s;
}

INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
INLINE size_t larger(size_t a, size_t b) { return a > b ? a : b; }
INLINE size_t count(__mmask16 mask) { return (size_t)__builtin_popcount(mask); }
INLINE struct tokens tokens_of(struct list list) { return (struct tokens){list.z, list.w, list.ids, list.n}; }
INLINE bool is_finite(float x) { return __builtin_fabsf(x) < __builtin_inff(); }

// The logits of a row after bias and penalties: in `copy`, or the row itself where there are none.
INLINE const float *penalised(const struct sample_args *a, size_t row, const float *x, float *copy) {
    const struct sampling *p = &a->params[row];
    const bool neutral = p->repetition_penalty == 1 && p->frequency_penalty == 0 && p->presence_penalty == 0;
    const bool biased = a->bias_ids && a->bias_starts[row] < a->bias_starts[row + 1];
    const bool seen = a->history_ids && !neutral && a->history_starts[row] < a->history_starts[row + 1];
    if (!biased && !seen) return x;

    for_each_16(i, mask, a->vocab) store(F32, copy, i, mask, load(F32, x, i, mask));
    if (biased)
        for (int64_t i = a->bias_starts[row]; i < a->bias_starts[row + 1]; i++)
            copy[a->bias_ids[i]] += a->bias_values[i];
    if (seen)
        for (int64_t i = a->history_starts[row]; i < a->history_starts[row + 1]; i++) {
            float *z = &copy[a->history_ids[i]];
            const float times = (float)a->history_counts[i];
            *z = *z > 0 ? *z / p->repetition_penalty : *z * p->repetition_penalty;
            *z -= p->frequency_penalty * times;
            *z -= p->presence_penalty * (float)(times > 0);
        }
    return copy;
}

static const int32_t FIRST_IDS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
INLINE __m512i ids_at(size_t i, __m512i first) { return _mm512_add_epi32(_mm512_set1_epi32((int)i), first); }

INLINE bool allows_all(const uint32_t *words, size_t vocab) {
    uint32_t all = 0xffffffff;
    for (size_t i = 0; i < vocab / 32; i++) all &= words[i];
    const uint32_t last = (1u << vocab % 32) - 1;
    return all == 0xffffffff && (!last || (words[vocab / 32] & last) == last);
}

// The tokens of a row whose bits are set; without weights.
INLINE struct tokens allowed(const uint32_t *words, const float *z, size_t vocab, struct list list) {
    const __m512i first = _mm512_loadu_si512(FIRST_IDS);
    list.n = 0;
    for_each_16(i, mask, vocab) {
        const __mmask16 which = (__mmask16)(words[i / 32] >> i % 32) & mask;
        if (!which) continue;
        const __m512 values = load(F32, z, i, mask);
        if (which == FULL) { // compress would be lane by lane on avx2
            _mm512_storeu_ps(list.z + list.n, values);
            _mm512_storeu_si512(list.ids + list.n, ids_at(i, first));
            list.n += LANES;
        } else {
            compress_ps(list.z + list.n, which, values);
            list.n += compress_epi32(list.ids + list.n, which, ids_at(i, first));
        }
    }
    return tokens_of(list);
}

// The largest z, and in `maxima` that of each lane of each block. NaN where there is a NaN.
INLINE float scan(const float *z, size_t n, float *maxima) {
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    __m512 largest = lowest;
    unsigned nan = 0;
    for (size_t begin = 0; begin < n; begin += BLOCK, maxima += LANES) {
        const size_t end = smaller(n, begin + BLOCK);
        __m512 of_block = lowest;
        size_t i = begin;
        for (; i + 4 * LANES <= end; i += 4 * LANES) {
            const __m512 a = _mm512_loadu_ps(z + i), b = _mm512_loadu_ps(z + i + LANES);
            const __m512 c = _mm512_loadu_ps(z + i + 2 * LANES), d = _mm512_loadu_ps(z + i + 3 * LANES);
            nan |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(c, d, _CMP_UNORD_Q);
            of_block = _mm512_max_ps(of_block, _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d)));
        }
        for (; i < end; i += LANES) {
            const __mmask16 mask = first16(end - i);
            const __m512 a = _mm512_mask_blend_ps(mask, lowest, load(F32, z, i, mask));
            nan |= _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
            of_block = _mm512_max_ps(of_block, a);
        }
        _mm512_storeu_ps(maxima, of_block);
        largest = _mm512_max_ps(largest, of_block);
    }
    return nan ? __builtin_nanf("") : _mm512_reduce_max_ps(largest);
}

// The lowest id whose z is the largest.
INLINE size_t argmax(const float *z, size_t n, const float *maxima, float largest) {
    const __m512 wanted = _mm512_set1_ps(largest);
    size_t i = 0;
    for (; !_mm512_cmp_ps_mask(_mm512_loadu_ps(maxima), wanted, _CMP_EQ_OQ); maxima += LANES) i += BLOCK;
    for (;; i += LANES) {
        const __mmask16 mask = first16(n - i);
        const unsigned hits = _mm512_cmp_ps_mask(load(F32, z, i, mask), wanted, _CMP_EQ_OQ) & mask;
        if (hits) return i + (size_t)__builtin_ctz(hits);
    }
}

struct sum {
    __m512d low, high;
};
INLINE struct sum no_sum(void) { return (struct sum){_mm512_setzero_pd(), _mm512_setzero_pd()}; }
INLINE struct sum plus(struct sum sum, __m512 x) {
    return (struct sum){_mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x))),
                        _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)))};
}
INLINE double total(struct sum sum) { return _mm512_reduce_add_pd(_mm512_add_pd(sum.low, sum.high)); }

INLINE __m512 depth(__m512 z, float largest, float temperature) {
    return _mm512_div_ps(_mm512_sub_ps(z, _mm512_set1_ps(largest)), _mm512_set1_ps(temperature));
}

// w = e^((z - largest) / temperature), and their sum.
INLINE double weigh(const float *z, size_t n, float largest, float temperature, float *w) {
    struct sum sum = no_sum();
    for_each_16(i, mask, n) {
        const __m512 weight = exp_ps(depth(load(F32, z, i, mask), largest, temperature));
        store(F32, w, i, mask, weight);
        sum = plus(sum, mask == FULL ? weight : _mm512_maskz_mov_ps(mask, weight));
    }
    return total(sum);
}

INLINE void append(struct list *list, __mmask16 which, __m512 z, __m512 w, __m512i ids) {
    compress_ps(list->z + list->n, which, z);
    compress_ps(list->w + list->n, which, w);
    list->n += compress_epi32(list->ids + list->n, which, ids);
}

// The tokens whose value is at least `least`; `from` may be the list itself. Without w, the list's is left at 0.
INLINE struct tokens gather(const float *values, float least, struct tokens from, struct list list) {
    const __m512i first = _mm512_loadu_si512(FIRST_IDS);
    list.n = 0;
    for_each_16(i, mask, from.n) {
        const __m512 value = load(F32, values, i, mask);
        const __mmask16 hits = _mm512_cmp_ps_mask(value, _mm512_set1_ps(least), _CMP_GE_OQ) & mask;
        if (hits)
            append(&list, hits, load(F32, from.z, i, mask), from.w ? load(F32, from.w, i, mask) : _mm512_setzero_ps(),
                   from.ids ? _mm512_loadu_si512(from.ids + i) : ids_at(i, first));
    }
    return tokens_of(list);
}

// Unsigned integers in the order of z; -0 is 0.
INLINE uint32_t key_of(float z) {
    const union {
        float f;
        uint32_t bits;
    } x = {z + 0.f};
    return x.bits ^ ((uint32_t)((int32_t)x.bits >> 31) | 0x80000000u);
}
INLINE float z_of(uint32_t key) {
    const union {
        uint32_t bits;
        float f;
    } x = {key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)};
    return x.f;
}

// What is kept: every z above the cut, and the first `ties` of those that are equal to it.
struct cut {
    float z;
    size_t ties;
};

// The bucket at which the weight from the top reaches the quota; adds to `above` what lies over it.
INLINE uint32_t crossing(const double *histogram, double quota, double *above) {
    uint32_t found = 0;
    double reached = *above;
    for (uint32_t bucket = BUCKETS; bucket-- > 0;) {
        if (histogram[bucket] == 0) continue;
        found = bucket;
        *above = reached;
        reached += histogram[bucket];
        if (reached >= quota) break;
    }
    return found;
}

// The cut that keeps the fewest tokens, the largest z first, that together weigh at least `quota`: each its
// w, or 1 where w is NULL.
INLINE struct cut cut_at(const float *z, const float *w, size_t n, double quota, const struct workspace *s) {
    static const int shifts[] = {32 - DIGIT, 32 - 2 * DIGIT, 0};
    uint32_t *restrict keys = s->keys;
    float *restrict weights = s->weights;
    double *restrict histogram = s->histogram;
    for (size_t i = 0; i < n; i++) keys[i] = key_of(z[i]);
    for (size_t i = 0; i < n; i++) weights[i] = w ? w[i] : 1;

    double above = 0;
    for (int level = 0; level < 3; level++) {
        const int shift = shifts[level];
        for (size_t i = 0; i < BUCKETS; i++) histogram[i] = 0;
        for (size_t i = 0; i < n; i++) histogram[keys[i] >> shift & (BUCKETS - 1)] += (double)weights[i];
        const uint32_t bucket = crossing(histogram, quota, &above);
        size_t inside = 0;
        for (size_t i = 0; i < n; i++) {
            const uint32_t key = keys[i];
            keys[inside] = key;
            weights[inside] = weights[i];
            inside += (key >> shift & (BUCKETS - 1)) == bucket;
        }
        n = inside;
    }
    const double needed = (quota - above) / (double)weights[0];
    const size_t whole = needed > 0 ? (size_t)needed : 0;
    return (struct cut){z_of(keys[0]), smaller(n, larger(1, whole + ((double)whole < needed)))};
}

// `from` may be the list itself.
INLINE struct tokens keep(struct tokens from, struct cut cut, struct list list) {
    const __m512 at = _mm512_set1_ps(cut.z);
    list.n = 0;
    for_each_16(i, mask, from.n) {
        const __m512 z = _mm512_loadu_ps(from.z + i), w = _mm512_loadu_ps(from.w + i);
        const __mmask16 above = _mm512_cmp_ps_mask(z, at, _CMP_GT_OQ) & mask;
        unsigned equal = _mm512_cmp_ps_mask(z, at, _CMP_EQ_OQ) & mask;
        while (count((__mmask16)equal) > cut.ties) equal ^= 1u << (31 - __builtin_clz(equal));
        cut.ties -= count((__mmask16)equal);
        append(&list, above | (__mmask16)equal, z, w, _mm512_loadu_si512(from.ids + i));
    }
    return tokens_of(list);
}

// The k largest z; `s->maxima` are theirs. At least k groups have a z that reaches the k-th largest maximum,
// and not many more do while k is small beside the number of groups.
INLINE struct tokens largest_z(size_t k, struct tokens from, const struct workspace *s) {
    const size_t groups = (from.n + BLOCK - 1) / BLOCK * LANES;
    const float least = 2 * k <= groups ? cut_at(s->maxima, NULL, groups, (double)k, s).z : -__builtin_inff();
    from.w = NULL;
    const struct tokens list = gather(from.z, least, from, s->list);
    return keep(list, cut_at(list.z, NULL, list.n, (double)k, s), s->list);
}

// All the tokens below this weigh less than 1 - share of the mass together; the last factor is for rounding.
INLINE float tail(float share, double mass, size_t n) {
    return (float)((1 - (double)share) * mass / (double)n * (1 - 0x1p-20));
}

// Where the entropy is: the mean of d, of the tokens whose w is at least `least`; and their mass.
struct center {
    double mass;
    float d;
};
INLINE struct center center_of(struct tokens from, float least, float largest, float temperature) {
    struct sum mass = no_sum(), moment = no_sum();
    for_each_16(i, mask, from.n) {
        const __m512 w = load(F32, from.w, i, mask), d = depth(load(F32, from.z, i, mask), largest, temperature);
        const __mmask16 kept = _mm512_cmp_ps_mask(w, _mm512_set1_ps(least), _CMP_GE_OQ) & mask;
        mass = plus(mass, _mm512_maskz_mov_ps(kept, w));
        moment = plus(moment, _mm512_maskz_mov_ps(kept, _mm512_mul_ps(w, d)));
    }
    return (struct center){total(mass), (float)(total(moment) / total(mass))};
}

// What typical-p leaves of the tokens that min-p keeps.
INLINE struct tokens typical(struct tokens from, const struct sampling *p, float largest, const struct workspace *s) {
    const float least = p->min_p > 0 ? p->min_p : 0x1p-149f; // the smallest above 0
    const struct center c = center_of(from, least, largest, p->temperature);
    // Below d = 2c, and for rounding below half of its weight, shifts are larger than all above it. So what weighs
    // less than that, and all together less than 1 - typical_p, comes after all that is kept.
    const float mirror = 0.5f * _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(2 * c.d)));
    const float share = tail(p->typical_p, c.mass, from.n), reached = share < mirror ? share : mirror;
    const struct tokens candidates = gather(from.w, least > reached ? least : reached, from, s->list);

    float *closeness = s->z; // -|d - c|; what was there is in the list
    for_each_16(i, mask, candidates.n) {
        const __m512 d = depth(load(F32, candidates.z, i, mask), largest, p->temperature), at = _mm512_set1_ps(c.d);
        store(F32, closeness, i, mask, _mm512_min_ps(_mm512_sub_ps(d, at), _mm512_sub_ps(at, d)));
    }
    const struct cut cut = cut_at(closeness, candidates.w, candidates.n, (double)p->typical_p * c.mass, s);
    return gather(closeness, cut.z, candidates, s->list);
}

// The first place at which the mass of the w that are at least `least` exceeds uniform · (all of it).
INLINE size_t draw(const float *w, size_t n, float least, double uniform, double *masses) {
    double all = 0;
    for (size_t begin = 0, block = 0; begin < n; begin += BLOCK, block++) {
        struct sum sum = no_sum();
        for_each_16(i, mask, smaller(BLOCK, n - begin)) {
            const __m512 weight = load(F32, w + begin, i, mask);
            const __mmask16 kept = _mm512_cmp_ps_mask(weight, _mm512_set1_ps(least), _CMP_GE_OQ);
            sum = plus(sum, _mm512_maskz_mov_ps(kept, weight));
        }
        masses[block] = total(sum);
        all += masses[block];
    }
    // The last block or token with any mass stands where rounding leaves the target unreached.
    const double target = uniform * all;
    double before = 0, reached = 0;
    size_t begin = 0, place = 0;
    for (size_t block = 0; block * BLOCK < n && reached <= target; block++) {
        if (masses[block] == 0) continue;
        begin = block * BLOCK;
        before = reached;
        reached += masses[block];
    }
    reached = before;
    for (size_t i = begin; i < smaller(n, begin + BLOCK) && reached <= target; i++) {
        if (w[i] == 0 || w[i] < least) continue;
        place = i;
        reached += (double)w[i];
    }
    return place;
}

INLINE int32_t token_of_row(const struct sample_args *a, size_t row, const float *x, const struct workspace *s) {
    if (a->given && a->given[row] >= 0) return is_finite(scan(x, a->vocab, s->maxima)) ? a->given[row] : -1;

    const struct sampling *p = &a->params[row];
    struct tokens t = {.z = penalised(a, row, x, s->z), .w = s->w, .n = a->vocab};
    if (a->allowed) {
        const uint32_t *words = (const uint32_t *)((const char *)a->allowed + row * a->allowed_stride);
        if (!allows_all(words, a->vocab)) t = allowed(words, t.z, a->vocab, s->list);
    }
    const float largest = scan(t.z, t.n, s->maxima);
    if (!is_finite(largest)) return -1;

    size_t place;
    if (p->temperature == 0) {
        place = argmax(t.z, t.n, s->maxima, largest);
    } else {
        const bool top_k = p->top_k > 0 && (size_t)p->top_k < t.n, top_p = p->top_p < 1;
        if (top_k) t = largest_z((size_t)p->top_k, t, s);
        if (!top_p) {
            weigh(t.z, t.n, largest, p->temperature, t.w); // apart, since without the sum it takes 4/5 of the time
        } else {
            const double mass = weigh(t.z, t.n, largest, p->temperature, t.w);
            if (!top_k) t = gather(t.w, tail(p->top_p, mass, t.n), t, s->list);
            t = keep(t, cut_at(t.z, t.w, t.n, (double)p->top_p * mass, s), s->list);
        }
        if (p->typical_p < 1) t = typical(t, p, largest, s);
        place = draw(t.w, t.n, p->min_p, a->uniforms[row], s->masses);
    }
    return t.ids ? t.ids[place] : (int32_t)place;
}

// How many come before the token, and 1.
INLINE int32_t rank_of(int32_t token, const float *x, size_t n) {
    const __m512 at = _mm512_set1_ps(x[token]);
    size_t rank = 1;
    for_each_16(i, mask, n) {
        const __m512 value = load(F32, x, i, mask);
        rank += count(_mm512_cmp_ps_mask(value, at, _CMP_GT_OQ) & mask);
        if (i < (size_t)token) rank += count(_mm512_cmp_ps_mask(value, at, _CMP_EQ_OQ) & first16((size_t)token - i));
    }
    return (int32_t)rank;
}

INLINE void sift(uint64_t *heap, size_t root, size_t n) {
    const uint64_t value = heap[root];
    for (size_t child; (child = 2 * root + 1) < n; root = child) {
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= value) break;
        heap[root] = heap[child];
    }
    heap[root] = value;
}
INLINE void sort_descending(uint64_t *values, size_t n) {
    for (size_t root = n / 2; root-- > 0;) sift(values, root, n);
    for (size_t left = n; left > 1;) {
        const uint64_t smallest = values[0];
        values[0] = values[--left];
        sift(values, 0, left);
        values[left] = smallest;
    }
}

INLINE void log_probabilities(const struct sample_args *a, size_t row, const float *x, const struct workspace *s) {
    const int32_t token = a->tokens[row];
    int32_t *top_tokens = a->top_tokens + row * a->num_top;
    float *top_logprobs = a->top_logprobs + row * a->num_top;
    const float largest = token < 0 ? __builtin_nanf("") : scan(x, a->vocab, s->maxima);
    if (!is_finite(largest)) {
        a->logprobs[row] = __builtin_nanf("");
        a->ranks[row] = 0;
        a->masses[row] = 1;
        for (size_t i = 0; i < a->num_top; i++) top_tokens[i] = -1, top_logprobs[i] = __builtin_nanf("");
        return;
    }
    a->masses[row] = weigh(x, a->vocab, largest, 1, s->w);
    a->logprobs[row] = x[token] - largest;
    a->ranks[row] = rank_of(token, x, a->vocab);
    if (!a->num_top) return;

    const struct tokens list = largest_z(a->num_top, (struct tokens){.z = x, .n = a->vocab}, s);
    for (size_t i = 0; i < list.n; i++) s->order[i] = (uint64_t)key_of(list.z[i]) << 32 | (uint32_t)~list.ids[i];
    sort_descending(s->order, list.n);
    for (size_t i = 0; i < list.n; i++) {
        top_tokens[i] = (int32_t)~(uint32_t)s->order[i];
        top_logprobs[i] = x[top_tokens[i]] - largest;
    }
}

void RUNG_NAME(sample)(const void *args, size_t begin, size_t end, void *scratch) {
    const struct sample_args *a = args;
    const struct workspace s = workspace_in(scratch, a->vocab);
    for (size_t row = begin; row < end; row++) {
        const float *x = (const float *)((const char *)a->logits + row * a->stride);
        a->tokens[row] = token_of_row(a, row, x, &s);
        if (a->logprobs) log_probabilities(a, row, x, &s);
    }
}
