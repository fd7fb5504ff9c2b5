"""Iterative MLP by parameter splits: the intermediate dimension in pieces, one after the other.

    x ─▶ up₀ ─▶ activation ─▶ down₀ ─┐
    x ─▶ up₁ ─▶ activation ─▶ down₁ ─┼─▶ sum, in float32
    ⋮                                │

The weights of a piece, its rows of up and its columns of down, and what comes of up for all tokens, stay in the cache
while a prompt goes through. Pieces are of the native kernels, so results are the same whatever the batch and
the threads; the sums of pieces are rounded apart, so they are not NATIVE's last bits.

PACE_IMBPS_PIECE is the number of intermediate features in a piece; without it, as many as have their weights in half of
an L3 cache of this machine.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from pace import host, kernels
from pace.ops.registry import Function, register
from pace.reference.arrays import Array, Float, bfloat16, float32
from pace.reference.pack_linear import PANEL, PackedLinear

from . import native

L3_BYTES = 16 << 20  # where it is not known
FEATURES = 2 * PANEL  # of which a piece has a whole number


@dataclass(frozen=True)
class Pieces:
    """The same part of the intermediate dimension of both weights, one after the other."""

    ups: Sequence[PackedLinear]
    downs: Sequence[PackedLinear]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self.ups, *self.downs))


def missing() -> str | None:
    return native.missing()


def register_all() -> None:
    functions: dict[str, Function] = {"pack_linear": kernels.pack_linear, "prepare": prepare, "mlp": mlp}
    register("mlp", "IMBPS", functions, (float32, bfloat16))


def prepare(up: PackedLinear, down: PackedLinear) -> Pieces:
    """ValueError for a PACE_IMBPS_PIECE that is no number of features."""
    inner, size = down.in_features, piece_size(up, down)
    bounds = [(begin, min(begin + size, inner)) for begin in range(0, inner, size)]
    return Pieces([rows_of(up, *each) for each in bounds], [columns_of(down, *each) for each in bounds])


def piece_size(up: PackedLinear, down: PackedLinear) -> int:
    """In features, whole pairs of panels. It follows from the machine, never from the number of threads: other pieces
    are other sums.
    """
    given = os.environ.get("PACE_IMBPS_PIECE")
    if given is not None and (not given.isdecimal() or int(given) < 1):
        raise ValueError(f"PACE_IMBPS_PIECE is {given!r}; it must be a number of features, at least 1")
    of_a_feature = (up.nbytes + down.nbytes) / down.in_features
    wanted = int(given) if given else int(l3_bytes() / 2 / of_a_feature)
    return max(wanted // FEATURES, 1) * FEATURES


@cache
def l3_bytes() -> int:
    """Of one L3 cache of this machine."""
    return host.describe().l3_bytes or L3_BYTES


def rows_of(weight: PackedLinear, begin: int, end: int) -> PackedLinear:
    """Output features begin … end, in the same memory; `begin` is at a panel."""
    each = 2 if weight.gated else 1
    panels = weight.panels[begin // PANEL * each : -(-end // PANEL) * each]
    return PackedLinear(panels, end - begin, weight.in_features, weight.gated)


def columns_of(weight: PackedLinear, begin: int, end: int) -> PackedLinear:
    """Input features begin … end, in memory of their own; `begin` is even."""
    step = 1 if weight.dtype == float32 else 2
    panels = np.ascontiguousarray(weight.panels[:, begin // step : -(-end // step)])
    return PackedLinear(panels, weight.out_features, end - begin)


def mlp(
    x: Array,
    weights: Pieces,
    up_bias: Float | None,
    down_bias: Float | None,
    activation: str,
    residual: Array | None = None,
) -> Array:
    """As pace.ops.mlp, with sums of pieces in float32."""
    total, bias, begin = None, down_bias, 0
    for up, down in zip(weights.ups, weights.downs, strict=True):
        end = begin + down.in_features
        if up.gated:
            inner = kernels.gated_mlp(x, up, None if up_bias is None else part_of(up_bias, begin, end), activation)
        else:
            inner = kernels.linear(x, up, None if up_bias is None else up_bias[begin:end], activation)
        total = kernels.linear(inner, down, bias, residual=total, out_dtype=np.float32)
        bias, begin = None, end
    assert total is not None
    if residual is not None:
        total += residual.astype(np.float32)
    result: Array = total.astype(x.dtype, copy=False)
    return result


def part_of(bias: Float, begin: int, end: int) -> Float:
    """Of a gated bias, gate's and up's."""
    gate, up = np.split(bias, 2)
    return np.concatenate((gate[begin:end], up[begin:end]))
