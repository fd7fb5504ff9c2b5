"""A mixture of experts (Shazeer et al., 2017), as GPT-OSS has it: gated MLPs, of which each token has a few."""

import numpy as np

from .activate import sigmoid
from .arrays import Array, Float, check_float, check_rows, check_type, f32, output_rows
from .pack_experts import MXFP4, PackedExperts, unpack_experts


def moe(
    x: Array,
    gate_up: PackedExperts,
    down: PackedExperts,
    chosen: Array,
    weights: Float,
    gate_up_bias: Float | None = None,
    down_bias: Float | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    out: Array | None = None,
) -> Array:
    """y = the sum over a token's experts e of weight_e · (h_e · down_eᵀ + down_bias_e), where

        gate = min(x · gate_eᵀ + gate_bias_e, limit)
        up   = x · up_eᵀ + up_bias_e, held to [-limit, limit]
        h_e  = (up + 1) · (gate · sigmoid(alpha · gate))

    x: (tokens, hidden), float32 or bfloat16. gate_up: gated, (inner, hidden) each; down: (hidden, inner); both of x's
    dtype or MXFP4. chosen: (tokens, k) int32, the experts of each token, and weights: (tokens, k) float32 (route).
    gate_up_bias: (experts, 2 · inner) float32, gate's then up's; down_bias: (experts, hidden) float32. limit may be
    infinite. Returns (tokens, hidden) of x's dtype, in `out` where it is given.

    Products and sums in float32, in ascending order of k; h_e is rounded to x's dtype. What the experts give is
    weighted and added in float32, in the order of `chosen`, and rounded once. MXFP4 gives the same bits as the weights
    unpacked to x's dtype. The native avx512 rung takes denormal bfloat16 as zero.

    TypeError for another dtype; ValueError for another shape, rows that are not contiguous, a gate_up that is not gated
    or a down that is, an expert that is not there, or a limit that is not positive.
    """
    check_experts(x, gate_up, down, limit)
    check_rows(x, "x", gate_up.in_features)
    check_choice(chosen, weights, len(x), gate_up.num_experts)
    check_bias(gate_up_bias, "gate_up_bias", gate_up.num_experts, 2 * gate_up.out_features)
    check_bias(down_bias, "down_bias", down.num_experts, down.out_features)
    result = output_rows(out, len(x), down.out_features, x.dtype)
    answers = np.zeros((*chosen.shape, down.out_features), np.float32)
    for expert in np.unique(chosen):
        token, rank = np.nonzero(chosen == expert)
        gate, up = (f32(x[token]) @ half.T for half in unpack_experts(gate_up, expert))
        if gate_up_bias is not None:
            gate_bias, up_bias = np.split(gate_up_bias[expert], 2)
            gate, up = gate + gate_bias, up + up_bias
        gate, up = np.minimum(gate, np.float32(limit)), np.clip(up, np.float32(-limit), np.float32(limit))
        inner = (up + 1) * (gate * sigmoid(np.float32(alpha) * gate))
        answer = f32(inner.astype(x.dtype)) @ unpack_experts(down, expert).T
        answers[token, rank] = answer if down_bias is None else answer + down_bias[expert]
    total = np.zeros((len(x), down.out_features), np.float32)
    for place in range(chosen.shape[1]):
        total += weights[:, place, None] * answers[:, place]
    result[...] = total
    return result


def check_experts(x: Array, gate_up: PackedExperts, down: PackedExperts, limit: float) -> None:
    check_float(x, "x")
    for experts, name, gated in ((gate_up, "gate_up", True), (down, "down", False)):
        if not isinstance(experts, PackedExperts):
            raise TypeError(f"{name} is a {type(experts).__name__}; it must be PackedExperts")
        if experts.dtype not in (x.dtype, MXFP4):
            raise TypeError(f"{name} has dtype {experts.dtype}; it must be {x.dtype}, as x, or uint8: MXFP4")
        if experts.gated != gated:
            raise ValueError(
                f"{name} is {'gated' if experts.gated else 'not gated'}; it must {'' if gated else 'not '}be"
            )
    wanted = gate_up.num_experts, gate_up.in_features, gate_up.out_features
    if (down.num_experts, down.out_features, down.in_features) != wanted:
        raise ValueError(
            f"down has {down.num_experts} experts of {down.out_features} × {down.in_features}; "
            f"it must have {wanted[0]} of {wanted[1]} × {wanted[2]}, as gate_up"
        )
    if not limit > 0:
        raise ValueError(f"limit is {limit}; it must be positive")


def check_choice(chosen: Array, weights: Array, tokens: int, num_experts: int) -> None:
    for array, name, dtype in ((chosen, "chosen", np.int32), (weights, "weights", np.float32)):
        check_type(array, name, dtype)
        check_rows(array, name)
        wanted = tokens, chosen.shape[1]
        if array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}; it must be {wanted}")
    if chosen.size and (chosen.min() < 0 or chosen.max() >= num_experts):
        wrong = int(chosen.min()) if chosen.min() < 0 else int(chosen.max())
        raise ValueError(f"chosen holds expert {wrong}; there are {num_experts}")


def check_bias(bias: Array | None, name: str, num_experts: int, features: int) -> None:
    if bias is None:
        return
    check_type(bias, name, np.float32)
    if bias.shape != (num_experts, features):
        raise ValueError(f"{name} has shape {bias.shape}; it must be {(num_experts, features)}")
    if not bias.flags.c_contiguous:
        raise ValueError(f"{name} has strides {bias.strides}; it must be contiguous")
