#pragma once
#include <stddef.h>

struct softmax_args {
    const void *x;
    void *out;
    size_t columns;
    size_t x_stride, out_stride; // bytes from one row to the next
    float scale;
    int kind; // of x and out
};

void softmax_avx2(const void *args, size_t begin, size_t end, void *scratch);
void softmax_avx512(const void *args, size_t begin, size_t end, void *scratch);
