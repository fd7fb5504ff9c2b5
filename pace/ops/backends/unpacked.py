"""Weights in a layout of a library's own; and rows as libraries take them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pace.ops.registry import Dtype
from pace.reference.arrays import Array, Float, check_vector, float32
from pace.reference.pack_linear import PANEL, PackedLinear, unpack_linear

ROWS = 256 * PANEL  # that are unpacked at a time


@dataclass(frozen=True)
class Weight:
    """(out, in), as the library keeps it."""

    values: Any
    out_features: int
    in_features: int
    dtype: Dtype
    nbytes: int
    gated: ClassVar[bool] = False


def rows_of(packed: PackedLinear) -> Array:
    """(out, in)"""
    rows = np.empty((packed.out_features, packed.in_features), packed.dtype)
    for begin in range(0, packed.out_features, ROWS):
        end = min(begin + ROWS, packed.out_features)
        rows[begin:end] = unpack_linear(
            PackedLinear(packed.panels[begin // PANEL : -(-end // PANEL)], end - begin, packed.in_features)
        )
    return rows


def halves(up: PackedLinear) -> list[PackedLinear]:
    """gate and up of a gated weight; else the weight."""
    if not up.gated:
        return [up]
    parts = (np.ascontiguousarray(up.panels[half::2]) for half in range(2))
    return [PackedLinear(panels, up.out_features, up.in_features) for panels in parts]


def each_of(prepare: Callable[[PackedLinear], Weight]) -> Callable[[PackedLinear, PackedLinear], tuple[Weight, ...]]:
    """An MLP's `prepare`: (gate, up, down) of a gated weight, else (up, down)."""

    def prepare_mlp(up: PackedLinear, down: PackedLinear) -> tuple[Weight, ...]:
        return tuple(prepare(each) for each in (*halves(up), down))

    return prepare_mlp


def biases_of(bias: Float | None, ups: list[Weight]) -> list[Float | None]:
    """Of each, where an MLP has one vector for them."""
    if bias is None:
        return [None] * len(ups)
    check_vector(bias, "up_bias", len(ups) * ups[0].out_features, float32)
    return [*np.split(bias, len(ups))]


def rows_apart(rows: Array) -> tuple[Array, int]:
    """Rows that follow one another, a copy where they do not, and the elements from one to the next."""
    if len(rows) < 2:
        return rows, rows.shape[1]
    if rows.strides[0] < rows.shape[1] * rows.itemsize:
        return np.ascontiguousarray(rows), rows.shape[1]
    return rows, rows.strides[0] // rows.itemsize


def given(result: Array, out: Array | None) -> Array:
    """In `out`, where there is one."""
    if out is None:
        return result
    out[...] = result
    return out
