#pragma once
#include <immintrin.h>

INLINE __m512bh as_bf16x32(__m512i x) {
    return (__m512bh)x;
}
INLINE __m256i bits_of_bf16x16(__m256bh x) {
    return (__m256i)x;
}
