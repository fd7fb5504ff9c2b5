"""Binding of the native gated_mlp; the contract is pace.reference.gated_mlp."""

cimport numpy as cnp

from pace._kernels.linear.linear cimport (
    Brgemm, linear_args, run_product, set_activation, set_bias, set_brgemm, set_weight, set_x,
)
from pace._kernels.runtime cimport output_rows, pace_worker

cnp.import_array()

cdef extern from "linear/linear.h":
    void gated_mlp_avx2(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil
    void gated_mlp_avx512(const void *args, size_t begin, size_t end, void *scratch) noexcept nogil

cdef pace_worker[2] WORKERS = [gated_mlp_avx2, gated_mlp_avx512]


def gated_mlp(cnp.ndarray x not None, weight, cnp.ndarray bias=None, str activation="silu", out=None):
    return gated_mlp_by(None, x, weight, bias, activation, out)


def gated_mlp_by(Brgemm made, cnp.ndarray x not None, weight, cnp.ndarray bias=None, str activation="silu", out=None):
    """As gated_mlp; with kernels that are not ours, where `made` has them."""
    cdef linear_args args
    set_weight(&args, weight, True)
    set_x(&args, x, weight)
    set_brgemm(&args, made)
    args.out_kind = args.kind
    set_bias(&args, bias, 2 * args.out_features)
    set_activation(&args, activation)
    cdef cnp.ndarray result = output_rows(out, args.rows, args.out_features, args.out_kind)
    args.out = cnp.PyArray_DATA(result)
    args.out_stride = cnp.PyArray_STRIDE(result, 0)
    run_product(WORKERS, &args)
    return result
