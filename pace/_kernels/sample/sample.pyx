"""Binding of the native sample; the contract is pace.reference.sample."""

cimport numpy as cnp
from libc.math cimport INFINITY, isfinite, log
from libc.stdint cimport int32_t, int64_t

import numpy as np

from pace._kernels.runtime cimport is_native, pace_worker, run
from pace.reference.sample import SAMPLING_DTYPE, Sampled, check

cnp.import_array()

cdef extern from "sample/sample.h" nogil:
    struct sampling:
        float temperature
        int32_t top_k
        float top_p
        float min_p
        float typical_p
        float repetition_penalty
        float frequency_penalty
        float presence_penalty
    struct sample_args:
        const void *logits
        size_t stride
        size_t vocab
        const sampling *params
        const double *uniforms
        const int32_t *history_ids
        const int32_t *history_counts
        const int64_t *history_starts
        const int32_t *bias_ids
        const float *bias_values
        const int64_t *bias_starts
        const void *allowed
        size_t allowed_stride
        const int32_t *given
        int32_t *tokens
        float *logprobs
        int32_t *ranks
        double *masses
        int32_t *top_tokens
        float *top_logprobs
        size_t num_top
    size_t sample_scratch_bytes(size_t vocab)
    void sample_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept
    void sample_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept

cdef pace_worker[2] WORKERS = [sample_avx2, sample_avx512]
cdef size_t ELEMENTS_PER_PIECE = 16384  # below this a thread costs more than it gives


def sample(
    logits, params, uniforms=None, history=None, bias=None, num_logprobs=None, allowed=None, given=None
):
    cdef sample_args args
    if not fits(logits, params, uniforms, history, bias, num_logprobs, allowed, given, &args):
        check(logits, params, uniforms, history, bias, num_logprobs, allowed, given)
        raise AssertionError("refused arguments that the reference takes")
    cdef Py_ssize_t rows = cnp.PyArray_DIM(logits, 0), row, i, n
    cdef cnp.ndarray tokens = np.empty(rows, np.int32), logprobs, ranks, masses, top_tokens, top_logprobs
    cdef size_t grain = ELEMENTS_PER_PIECE // (args.vocab + 1) + 1
    args.tokens = <int32_t *>cnp.PyArray_DATA(tokens)
    args.logprobs = NULL
    if num_logprobs is None:
        run(WORKERS, &args, rows, grain, sample_scratch_bytes(args.vocab))
        return Sampled(tokens, None, None, None, None)

    n = num_logprobs
    logprobs, ranks, masses = np.empty(rows, np.float32), np.empty(rows, np.int32), np.empty(rows)
    top_tokens, top_logprobs = np.empty((rows, n), np.int32), np.empty((rows, n), np.float32)
    args.logprobs = <float *>cnp.PyArray_DATA(logprobs)
    args.ranks = <int32_t *>cnp.PyArray_DATA(ranks)
    args.masses = <double *>cnp.PyArray_DATA(masses)
    args.top_tokens = <int32_t *>cnp.PyArray_DATA(top_tokens)
    args.top_logprobs = <float *>cnp.PyArray_DATA(top_logprobs)
    args.num_top = n
    run(WORKERS, &args, rows, grain, sample_scratch_bytes(args.vocab))
    cdef double log_mass
    for row in range(rows):
        log_mass = log(args.masses[row])
        args.logprobs[row] = <float>(args.logprobs[row] - log_mass)
        for i in range(row * n, row * n + n):
            args.top_logprobs[i] = <float>(args.top_logprobs[i] - log_mass)
    return Sampled(tokens, logprobs, ranks, top_tokens, top_logprobs)


# What follows answers whether the reference's `check` would pass, without its temporaries, and fills `args`.

cdef bint fits(
    logits, params, uniforms, history, bias, num_logprobs, allowed, given, sample_args *args
) except -1:
    if not (isinstance(logits, np.ndarray) and is_native(logits, cnp.NPY_FLOAT32) and logits.ndim == 2):
        return False
    cdef Py_ssize_t rows = cnp.PyArray_DIM(logits, 0), vocab = cnp.PyArray_DIM(logits, 1), i
    cdef bint draws
    if vocab > 1 and rows and cnp.PyArray_STRIDE(logits, 1) != sizeof(float):
        return False
    if not (isinstance(params, np.ndarray) and params.dtype == SAMPLING_DTYPE and is_vector(params, rows)):
        return False
    args.logits = cnp.PyArray_DATA(logits)
    args.stride = cnp.PyArray_STRIDE(logits, 0)
    args.vocab = vocab
    args.params = <const sampling *>cnp.PyArray_DATA(params)
    args.uniforms = NULL
    args.history_ids = args.history_counts = args.bias_ids = args.given = NULL
    args.allowed = NULL
    if uniforms is not None:
        if not is_vector_of(uniforms, rows, cnp.NPY_FLOAT64):
            return False
        args.uniforms = <const double *>cnp.PyArray_DATA(uniforms)
    if given is not None:
        if not is_vector_of(given, rows, cnp.NPY_INT32):
            return False
        args.given = <const int32_t *>cnp.PyArray_DATA(given)
    for i in range(rows):
        if args.given and not -1 <= args.given[i] < vocab:
            return False
        draws = args.params[i].temperature != 0 and not (args.given and args.given[i] >= 0)
        if not in_range(&args.params[i]) or (draws if args.uniforms is NULL else not 0 <= args.uniforms[i] < 1):
            return False
    if history is not None:
        if not is_ragged(history, rows, vocab, cnp.NPY_INT32):
            return False
        args.history_ids = <const int32_t *>cnp.PyArray_DATA(history[0])
        args.history_counts = <const int32_t *>cnp.PyArray_DATA(history[1])
        args.history_starts = <const int64_t *>cnp.PyArray_DATA(history[2])
        for i in range(cnp.PyArray_SIZE(history[1])):
            if args.history_counts[i] < 0:
                return False
    if bias is not None:
        if not is_ragged(bias, rows, vocab, cnp.NPY_FLOAT32):
            return False
        args.bias_ids = <const int32_t *>cnp.PyArray_DATA(bias[0])
        args.bias_values = <const float *>cnp.PyArray_DATA(bias[1])
        args.bias_starts = <const int64_t *>cnp.PyArray_DATA(bias[2])
        for i in range(cnp.PyArray_SIZE(bias[1])):
            if not args.bias_values[i] < INFINITY:
                return False
    if allowed is not None:
        if not is_masks(allowed, rows, (vocab + 31) // 32):
            return False
        args.allowed = cnp.PyArray_DATA(allowed)
        args.allowed_stride = cnp.PyArray_STRIDE(allowed, 0)
    return num_logprobs is None or 0 <= num_logprobs <= vocab


cdef bint in_range(const sampling *p) noexcept:
    return (
        0 <= p.temperature < INFINITY
        and 0 <= p.top_p <= 1
        and 0 <= p.min_p <= 1
        and 0 <= p.typical_p <= 1
        and 0 < p.repetition_penalty < INFINITY
        and isfinite(p.frequency_penalty)
        and isfinite(p.presence_penalty)
    )


cdef bint is_vector(cnp.ndarray array, Py_ssize_t length) except -1:
    return cnp.PyArray_NDIM(array) == 1 and cnp.PyArray_DIM(array, 0) == length and (
        length <= 1 or cnp.PyArray_STRIDE(array, 0) == cnp.PyArray_ITEMSIZE(array)
    )


cdef bint is_vector_of(object array, Py_ssize_t length, int typenum) except -1:
    return isinstance(array, np.ndarray) and is_native(array, typenum) and is_vector(array, length)


cdef bint is_masks(object array, Py_ssize_t rows, Py_ssize_t words) except -1:
    return (
        isinstance(array, np.ndarray)
        and is_native(array, cnp.NPY_INT32)
        and array.ndim == 2
        and cnp.PyArray_DIM(array, 0) == rows
        and cnp.PyArray_DIM(array, 1) == words
        and (words <= 1 or rows == 0 or cnp.PyArray_STRIDE(array, 1) == sizeof(int32_t))
    )


cdef bint is_ragged(object ragged, Py_ssize_t rows, Py_ssize_t vocab, int typenum) except -1:
    ids, values, starts = ragged
    if not isinstance(ids, np.ndarray):
        return False
    cdef Py_ssize_t total = cnp.PyArray_SIZE(ids), i
    if not (is_vector_of(ids, total, cnp.NPY_INT32) and is_vector_of(values, total, typenum)):
        return False
    if not is_vector_of(starts, rows + 1, cnp.NPY_INT64):
        return False
    cdef const int64_t *start = <const int64_t *>cnp.PyArray_DATA(starts)
    cdef const int32_t *token_id = <const int32_t *>cnp.PyArray_DATA(ids)
    if start[0] != 0 or start[rows] != total:
        return False
    for i in range(rows):
        if start[i + 1] < start[i]:
            return False
    for i in range(total):
        if not 0 <= token_id[i] < vocab:
            return False
    return True
