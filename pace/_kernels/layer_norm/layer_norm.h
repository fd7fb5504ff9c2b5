#pragma once
#include <stddef.h>

struct layer_norm_args {
    const void *x;
    const float *weight;
    const float *bias; // NULL for none
    void *out;
    size_t hidden;
    size_t x_stride, out_stride; // bytes from one row to the next
    float eps;
    int kind; // of x and out
};

void layer_norm_avx2(const void *args, size_t begin, size_t end, void *scratch);
void layer_norm_avx512(const void *args, size_t begin, size_t end, void *scratch);
