// Activations of sixteen float32 lanes.
#pragma once
#include "math.h"

enum activation { NONE, RELU, GELU_ERF, GELU_TANH, SILU };

// x / (1 + e^-x)
INLINE __m512 silu(__m512 x) { return _mm512_mul_ps(x, sigmoid_ps(x)); }

// x/2 · (1 + erf(x/√2)), Hendrycks and Gimpel (2016)
INLINE __m512 gelu_erf(__m512 x) {
    const __m512 erf = erf_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
    const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(.5f));
    return _mm512_fmadd_ps(half, erf, half);
}

// its approximation x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))
INLINE __m512 gelu_tanh(__m512 x) {
    const __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
    const __m512 tanh = tanh_ps(_mm512_mul_ps(_mm512_add_ps(x, cubic), _mm512_set1_ps(0.79788456f)));
    const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(.5f));
    return _mm512_fmadd_ps(half, tanh, half);
}

INLINE __m512 activate(enum activation activation, __m512 x) {
    switch (activation) {
    case RELU:
        return _mm512_max_ps(_mm512_setzero_ps(), x); // the operand order keeps a NaN
    case GELU_ERF:
        return gelu_erf(x);
    case GELU_TANH:
        return gelu_tanh(x);
    case SILU:
        return silu(x);
    default:
        return x;
    }
}
