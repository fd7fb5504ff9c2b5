// Elementary functions of sixteen float32 lanes. NaN stays NaN; what each gives at the ends is said where it
// is defined. Errors are the largest over all float32, on both rungs.
#pragma once
#include "simd.h"

// x held to [low, high]; the operand order keeps a NaN.
INLINE __m512 clamp_ps(__m512 x, float low, float high) {
    return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x));
}

// a·x + b
INLINE __m512 horner(__m512 a, __m512 x, float b) { return _mm512_fmadd_ps(a, x, _mm512_set1_ps(b)); }

// e^x within 0.9 ulp, denormal results included: 0 from -104 down, infinity above 88.722.
// e^x = 2^n · e^r with n = round(x / ln 2), |r| ≤ ln 2 / 2, and Cephes' polynomial for e^r.
INLINE __m512 exp_ps(__m512 x) {
    const __m512 held = clamp_ps(x, -104.f, 89.f);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(held, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147182f), held);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-1.90465430e-9f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = horner(p, r, 1.3981999507e-3f);
    p = horner(p, r, 8.3334519073e-3f);
    p = horner(p, r, 4.1665795894e-2f);
    p = horner(p, r, 1.6666665459e-1f);
    p = horner(p, r, 5.0000001201e-1f);
    p = horner(p, r, 1.f);
    p = horner(p, r, 1.f);
    return _mm512_scalef_ps(p, n);
}

// 2^x within 1 ulp for x ≤ 0, as a softmax asks for: 0 below -125. 2^x = 2^n · 2^r with n = round(x), |r| ≤ 1/2, and the
// polynomial that comes closest to 2^r there, 1 at 0.
INLINE __m512 exp2_ps(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.5353361960e-04f);
    p = horner(p, r, 1.3398875017e-03f);
    p = horner(p, r, 9.6184369177e-03f);
    p = horner(p, r, 5.5503323674e-02f);
    p = horner(p, r, 2.4022647738e-01f);
    p = horner(p, r, 6.9314718246e-01f);
    p = horner(p, r, 1.f);
    return scale_from(-125.f, x, p, n);
}

// 1 / (1 + e^-x) within 2.5 ulp; 0 where e^-x overflows.
INLINE __m512 sigmoid_ps(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// tanh and erf are the odd rational functions x·p(x²)/q(x²) of Eigen, on the range where they are not yet ±1.
// p/q comes first: x·p would be denormal for tiny x.

// Within 5 ulp; exactly ±1 from ±7.998812 on, where the rational function first reaches it with fused steps.
INLINE __m512 tanh_ps(__m512 x) {
    const __m512 held = clamp_ps(x, -7.99881172180175781f, 7.99881172180175781f);
    const __m512 square = _mm512_mul_ps(held, held);
    __m512 p = _mm512_set1_ps(-2.76076847742355e-16f);
    p = horner(p, square, 2.00018790482477e-13f);
    p = horner(p, square, -8.60467152213735e-11f);
    p = horner(p, square, 5.12229709037114e-08f);
    p = horner(p, square, 1.48572235717979e-05f);
    p = horner(p, square, 6.37261928875436e-04f);
    p = horner(p, square, 4.89352455891786e-03f);
    __m512 q = _mm512_set1_ps(1.19825839466702e-06f);
    q = horner(q, square, 1.18534705686654e-04f);
    q = horner(q, square, 2.26843463243900e-03f);
    q = horner(q, square, 4.89352518554385e-03f);
    return _mm512_mul_ps(held, _mm512_div_ps(p, q));
}

// Within 4e-7, and 7 ulp; exactly ±1 from ±4 on.
INLINE __m512 erf_ps(__m512 x) {
    const __m512 held = clamp_ps(x, -4.f, 4.f);
    const __m512 square = _mm512_mul_ps(held, held);
    __m512 p = _mm512_set1_ps(-2.72614225801306e-10f);
    p = horner(p, square, 2.77068142495902e-08f);
    p = horner(p, square, -2.10102402082508e-06f);
    p = horner(p, square, -5.69250639462346e-05f);
    p = horner(p, square, -7.34990630326855e-04f);
    p = horner(p, square, -2.95459980854025e-03f);
    p = horner(p, square, -1.60960333262415e-02f);
    __m512 q = _mm512_set1_ps(-1.45660718464996e-05f);
    q = horner(q, square, -2.13374055278905e-04f);
    q = horner(q, square, -1.68282697438203e-03f);
    q = horner(q, square, -7.37332916720468e-03f);
    q = horner(q, square, -1.42647390514189e-02f);
    return _mm512_mul_ps(held, _mm512_div_ps(p, q));
}
