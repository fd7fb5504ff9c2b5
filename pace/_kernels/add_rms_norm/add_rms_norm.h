#pragma once
#include <stddef.h>

struct add_rms_norm_args {
    const void *x;
    void *residual;
    const float *weight;
    void *out;
    size_t hidden;
    size_t x_stride, residual_stride, out_stride; // bytes from one row to the next
    float eps;
    int kind; // of x, residual and out
};

void add_rms_norm_avx2(const void *args, size_t begin, size_t end, void *scratch);
void add_rms_norm_avx512(const void *args, size_t begin, size_t end, void *scratch);
