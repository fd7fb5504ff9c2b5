"""Weights in panels, as rows again: for backends that have a layout of their own."""

import numpy as np

from pace.reference.arrays import Array
from pace.reference.pack_linear import PANEL, PackedLinear, unpack_linear

ROWS = 256 * PANEL  # that are unpacked at a time


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
