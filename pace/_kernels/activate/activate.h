#pragma once
#include <stddef.h>

struct activate_args {
    const void *x, *multiply; // multiply: NULL for none
    void *out;
    size_t columns;
    size_t x_stride, multiply_stride, out_stride; // bytes from one row to the next
    int activation;                               // simd/activation.h
    int kind;                                     // of x, multiply and out
};

void activate_avx2(const void *args, size_t begin, size_t end, void *scratch);
void activate_avx512(const void *args, size_t begin, size_t end, void *scratch);
