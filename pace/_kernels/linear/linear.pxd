# The half of a call that linear and gated_mlp share.
cimport numpy as cnp

from pace._kernels.runtime cimport pace_worker

cdef extern from "linear/linear.h":
    enum: ROWS_PER_BLOCK
    struct brgemm:
        int api
        unsigned long long count
        size_t panel_bytes
        size_t x_bytes
        const void *blocks[2]
        const void *left[2]
    struct linear_args:
        const void *x
        size_t x_stride
        unsigned *a
        const unsigned *panels
        size_t num_panels
        size_t rows
        size_t in_features
        size_t out_features
        int kind
        const brgemm *brgemm
        const float *bias
        int activation
        const void *multiply
        const void *residual
        size_t multiply_stride
        size_t residual_stride
        void *out
        size_t out_stride
        int out_kind


cdef class Brgemm:
    """Kernels of a library, for rows of one length and number."""
    cdef brgemm kernels
    cdef readonly size_t rows
    cdef readonly size_t x_stride

cdef int set_brgemm(linear_args *args, Brgemm made) except -1
cdef int set_weight(linear_args *args, object weight, bint gated) except -1
cdef int set_activation(linear_args *args, str activation) except -1
cdef int set_bias(linear_args *args, cnp.ndarray bias, Py_ssize_t length) except -1
cdef int set_x(linear_args *args, cnp.ndarray x, object weight) except -1
cdef int run_product(const pace_worker *workers, linear_args *args) except -1
