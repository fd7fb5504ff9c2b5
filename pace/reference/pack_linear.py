"""Weights of linear layers as the matrix tile reads them: panels of 16 output features.

    weight (N, K), float32     panels [N/16][K][16]         16 rows' elements of one k side by side
    weight (N, K), bfloat16    panels [N/16][K/2][16][2]    the same, for pairs of neighbouring k

                k=0      k=1      k=2      k=3
    row 0        a        b        c        d
    row 1        e        f        g        h       →  a b e f … (32 numbers)  c d g h …
    ⋮

N is filled up with rows of zeros to whole panels, an odd K with a column of zeros to whole pairs.
"""

from dataclasses import dataclass

import numpy as np

from .arrays import Array, Float, bfloat16, check_float, check_rows, check_writeable, f32, float32

PANEL = 16


@dataclass(frozen=True)
class PackedLinear:
    """The weight of a linear layer, (out_features, in_features), in panels.

    `gated`: the panels of two weights alternate, gate's then up's, each of `out_features` rows (see gated_mlp).
    """

    panels: Array
    out_features: int
    in_features: int
    gated: bool = False

    def __post_init__(self) -> None:
        check_float(self.panels, "panels")
        wanted = panels_shape(self.out_features, self.in_features, self.dtype, self.gated)
        if self.panels.shape != wanted:
            features = f"{self.out_features} × {self.in_features}{', gated' if self.gated else ''}"
            raise ValueError(f"panels has shape {self.panels.shape}; it must be {wanted} ({features})")
        if not self.panels.flags.c_contiguous:
            raise ValueError(f"panels has strides {self.panels.strides}; it must be C-contiguous")

    @staticmethod
    def empty(out_features: int, in_features: int, dtype: np.dtype[np.generic], gated: bool = False) -> "PackedLinear":
        """Room for a weight, not initialised: every panel is for pack_linear to fill."""
        panels = np.empty(panels_shape(out_features, in_features, dtype, gated), dtype)
        return PackedLinear(panels, out_features, in_features, gated)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self.panels.dtype

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes


def panels_shape(
    out_features: int, in_features: int, dtype: np.dtype[np.generic], gated: bool = False
) -> tuple[int, ...]:
    num_panels = -(-out_features // PANEL) * (2 if gated else 1)
    if dtype == bfloat16:
        return num_panels, -(-in_features // 2), PANEL, 2
    if dtype == float32:
        return num_panels, in_features, PANEL
    raise TypeError(f"dtype is {dtype}; it must be float32 or bfloat16")


def pack_linear(
    weight: Array, into: PackedLinear | None = None, first_panel: int = 0, panel_step: int = 1
) -> PackedLinear:
    """Lay out weight (rows, K), float32 or bfloat16, as panels; returns `into`, or a new one of weight's dtype.

    Rows 16·i … 16·i+15 go to panel `first_panel + i · panel_step` of `into`, rounded to its dtype; several weights are
    packed into one by calling once for each (rows that come after must start a panel of their own).

    ValueError for a K other than into's, more panels than it has, or a weight that holds NaN (packed all the
    same), an `into` that is read-only; TypeError for another dtype.
    """
    check_float(weight, "weight")
    check_rows(weight, "weight")
    rows, columns = weight.shape
    if into is None:
        into = PackedLinear.empty(rows, columns, weight.dtype)
    if columns != into.in_features:
        raise ValueError(f"weight has shape {weight.shape}; it must be (rows, {into.in_features})")
    check_writeable(into.panels, "into.panels")
    count = -(-rows // PANEL)
    if first_panel < 0 or panel_step < 1 or (count and first_panel + (count - 1) * panel_step >= len(into.panels)):
        raise ValueError(
            f"{count} panels from {first_panel} in steps of {panel_step} do not fit the {len(into.panels)} there are"
        )
    padded = np.zeros((count * PANEL, columns + columns % 2), into.dtype)
    padded[:rows, :columns] = weight.astype(into.dtype)
    if into.dtype == bfloat16:
        panels: Array = padded.reshape(count, PANEL, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    else:
        panels = padded[:, :columns].reshape(count, PANEL, columns).transpose(0, 2, 1)
    into.panels[first_panel : first_panel + count * panel_step : panel_step] = panels
    if np.isnan(f32(weight)).any():
        raise ValueError("weight holds NaN")
    return into


def unpack_linear(weight: PackedLinear) -> Float:
    """The weight (out_features, in_features) in float32; (2, out_features, in_features) of a gated one."""
    panels = f32(weight.panels)
    if weight.dtype == bfloat16:
        panels = panels.transpose(0, 2, 1, 3).reshape(len(panels), PANEL, 2 * panels.shape[1])
    else:
        panels = panels.transpose(0, 2, 1)
    panels = panels[:, :, : weight.in_features]
    if not weight.gated:
        return panels.reshape(PANEL * len(panels), weight.in_features)[: weight.out_features]
    halves = panels.reshape(len(panels) // 2, 2, PANEL, weight.in_features).transpose(1, 0, 2, 3)
    return halves.reshape(2, PANEL * halves.shape[1], weight.in_features)[:, : weight.out_features]
