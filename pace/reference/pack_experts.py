"""Weights of the experts of one layer, one behind the other, each in panels of 16 output features.

float32 and bfloat16 are packed as pack_linear's. MXFP4 (OCP Microscaling Formats v1.0) stays as it is, 17 bytes for 32
weights: a weight is an E2M1 of four bits, times a power of two that 32 neighbours along k share. A panel is

    panels [K/32][17][16]     16 bytes of scales s, one a row, each 2^(s - 127); then 16 lines of codes
    line 4q … 4q + 3          of each row the 32 bits that hold k = 8q … 8q + 7:

                              bits 0 … 15     k = 8q, + 2, + 4, + 6     from the lowest bits on
                              bits 16 … 31    k = 8q + 1, + 3, + 5, + 7

so that a shift by 0, 4, 8 or 12 brings pairs of neighbours under one table of 16-bit numbers: bfloat16 has all the
values, and pairs of them are what a panel of bfloat16 holds. The code 8, the negative zero, does not occur.
"""

from dataclasses import dataclass

import numpy as np

from .arrays import Array, Float, bfloat16, check_aligned, check_writeable, f32, float32
from .pack_linear import PANEL, PackedLinear, pack_linear, panels_shape, unpack_linear

MXFP4 = np.dtype(np.uint8)  # the dtype of its panels
BLOCK = 32  # weights along k that share a scale
MAX_SCALE = 252  # 6 · 2^(252 - 127) is the largest of them that bfloat16 has
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# Where the 32 bits of eight codes have those of k = 0, 1, …
_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)


@dataclass(frozen=True)
class PackedExperts:
    """The weights of all experts, each (out_features, in_features), in panels.

    panels: (experts, panels, …) float32 or bfloat16 as PackedLinear's, or uint8: MXFP4. `gated`: the panels of two
    weights alternate, gate's then up's, each of `out_features` rows.
    """

    panels: Array
    out_features: int
    in_features: int
    gated: bool = False

    def __post_init__(self) -> None:
        check_aligned(self.panels, "panels")
        wanted = _shape(self.out_features, self.in_features, self.dtype, self.gated)
        if self.panels.shape[1:] != wanted:
            features = f"{self.out_features} × {self.in_features}{', gated' if self.gated else ''}"
            shape = ", ".join(map(str, ("experts", *wanted)))
            raise ValueError(f"panels has shape {self.panels.shape}; it must be ({shape}) ({features})")
        if not self.panels.flags.c_contiguous:
            raise ValueError(f"panels has strides {self.panels.strides}; it must be C-contiguous")

    @staticmethod
    def empty(
        num_experts: int, out_features: int, in_features: int, dtype: np.dtype[np.generic], gated: bool = False
    ) -> "PackedExperts":
        """Room for the weights, not initialised: every panel is for pack_experts to fill. dtype MXFP4 keeps MXFP4."""
        panels = np.empty((num_experts, *_shape(out_features, in_features, dtype, gated)), dtype)
        return PackedExperts(panels, out_features, in_features, gated)

    @property
    def num_experts(self) -> int:
        return len(self.panels)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self.panels.dtype

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def linear(self, expert: int) -> PackedLinear:
        """One expert's weight, of float32 or bfloat16: the same memory."""
        return PackedLinear(self.panels[expert], self.out_features, self.in_features, self.gated)


def _shape(out_features: int, in_features: int, dtype: np.dtype[np.generic], gated: bool) -> tuple[int, ...]:
    if dtype in (float32, bfloat16):
        return panels_shape(out_features, in_features, dtype, gated)
    if dtype != MXFP4:
        raise TypeError(f"dtype is {dtype}; it must be float32, bfloat16, or uint8 for MXFP4")
    if in_features % BLOCK:
        raise ValueError(f"in_features is {in_features}; in MXFP4 it must be a multiple of {BLOCK}")
    return -(-out_features // PANEL) * (2 if gated else 1), in_features // BLOCK, 1 + PANEL, PANEL


def pack_experts(
    weight: Array,
    into: PackedExperts,
    expert: int,
    scales: Array | None = None,
    first_panel: int = 0,
    panel_step: int = 1,
) -> PackedExperts:
    """Lay out rows of one expert's weight as panels of `into`, which is returned.

    Without scales: weight (rows, K), and all is as in pack_linear. With scales (rows, K/32) uint8, weight is (rows,
    K/32, 16) uint8, as checkpoints have MXFP4: a byte is two codes, that of the lower k in its lower bits; both with
    any stride between rows, contiguous within a row. Rows 16·i … 16·i+15 go to panel `first_panel + i · panel_step`.

    MXFP4 stays exact, but for two things: what is no normal bfloat16, smaller than 2^-126 (0.5, 1 and 1.5 at a scale of
    0, and 0.5 at 1), becomes zero, and zero has no sign.

    Errors as pack_linear's; ValueError also for no such expert, for scales where `into` is not MXFP4, none where it
    is, and a scale above 252: 255 is NaN, and 253 and 254 have values that are no bfloat16.
    """
    if not 0 <= expert < into.num_experts:
        raise ValueError(f"expert is {expert}; into has {into.num_experts}")
    if (scales is None) != (into.dtype != MXFP4):
        raise ValueError(f"into has dtype {into.dtype}: {'it takes' if scales is None else 'it takes no'} scales")
    if scales is None:
        pack_linear(weight, into.linear(expert), first_panel, panel_step)
        return into
    rows, blocks = check_blocks(weight, scales, into.in_features)
    check_writeable(into.panels, "into.panels")
    count, num_panels = -(-rows // PANEL), into.panels.shape[1]
    if first_panel < 0 or panel_step < 1 or (count and first_panel + (count - 1) * panel_step >= num_panels):
        raise ValueError(
            f"{count} panels from {first_panel} in steps of {panel_step} do not fit the {num_panels} there are"
        )
    highest = int(scales.max(initial=0))
    if highest > MAX_SCALE:
        raise ValueError(f"scales holds {highest}; it must be at most {MAX_SCALE} (255 is NaN)")
    codes = np.zeros((count * PANEL, blocks, BLOCK), np.uint32)
    codes[:rows, :, 0::2], codes[:rows, :, 1::2] = weight & 15, weight >> 4
    exponents = np.full((count * PANEL, blocks), 127, np.uint8)
    exponents[:rows] = scales
    least = np.select([exponents == 0, exponents == 1], [4, 2], 1)[..., None]  # the code of the least normal number
    codes[codes & 7 < least] = 0

    panels = np.empty((count, blocks, 1 + PANEL, PANEL), np.uint8)
    panels[:, :, 0] = exponents.reshape(count, PANEL, blocks).transpose(0, 2, 1)
    words = np.bitwise_or.reduce(codes.reshape(count, PANEL, blocks, 4, 8) << _SHIFTS, axis=-1)
    lines = words.transpose(0, 2, 3, 1).astype("<u4", order="C").view(np.uint8)
    panels[:, :, 1:] = lines.reshape(count, blocks, PANEL, PANEL)
    into.panels[expert, first_panel : first_panel + count * panel_step : panel_step] = panels
    return into


def check_blocks(weight: Array, scales: Array, in_features: int) -> tuple[int, int]:
    """MXFP4 as checkpoints have it; returns rows and blocks in a row."""
    for array, name, wanted in (
        (weight, "weight", (in_features // BLOCK, 16)),
        (scales, "scales", (in_features // BLOCK,)),
    ):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} is a {type(array).__name__}; it must be a NumPy array")
        if array.dtype != np.uint8:
            raise TypeError(f"{name} has dtype {array.dtype}; it must be uint8")
        if array.shape[1:] != wanted or array.shape[0] != len(weight):
            rows = "rows" if array is weight else len(weight)
            raise ValueError(f"{name} has shape {array.shape}; it must be ({rows}, {', '.join(map(str, wanted))})")
        if array.size and not array[0].flags.c_contiguous:
            raise ValueError(f"{name} has strides {array.strides}; its rows must be contiguous")
    return len(weight), in_features // BLOCK


def unpack_experts(weight: PackedExperts, expert: int) -> Float:
    """One expert's weight (out_features, in_features) in float32; (2, out_features, in_features) where it is gated."""
    if weight.dtype != MXFP4:
        return unpack_linear(weight.linear(expert))
    panels = weight.panels[expert]
    count, blocks = panels.shape[:2]
    words = np.ascontiguousarray(panels[:, :, 1:]).view("<u4").reshape(count, blocks, 4, PANEL, 1)
    values = E2M1[words >> _SHIFTS & 15]  # (panels, blocks, 4, 16 rows, 8)
    scales = np.ldexp(f32(np.ones(1)), panels[:, :, 0].astype(np.int32) - 127)  # (panels, blocks, 16 rows)
    rows: Float = (
        (values * scales[:, :, None, :, None]).transpose(0, 3, 1, 2, 4).reshape(count, PANEL, weight.in_features)
    )
    if not weight.gated:
        return rows.reshape(count * PANEL, weight.in_features)[: weight.out_features]
    halves: Float = rows.reshape(count // 2, 2, PANEL, weight.in_features).transpose(1, 0, 2, 3)
    return halves.reshape(2, count // 2 * PANEL, weight.in_features)[:, : weight.out_features]
