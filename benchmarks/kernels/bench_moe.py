import numpy as np
import pytest

from benchmarks.case import KINDS, draw, draw_weight
from pace.reference.arrays import bfloat16
from pace.reference.pack_experts import MXFP4, PackedExperts, pack_experts

# GPT-OSS: hidden and inner size, and the experts of each token; so many experts that a token's are not in the caches.
HIDDEN, INNER, CHOSEN = 2880, 2880, 4
EXPERTS = 16


def experts(rows, columns, kind, gated):
    """The same weight for all: what is measured is moving and multiplying it."""
    packed = PackedExperts.empty(EXPERTS, rows, columns, kind, gated)
    codes = np.random.default_rng(0).integers(0, 256, (rows, columns // 32, 16), np.uint8)
    scales = np.full((rows, columns // 32), 119, np.uint8)  # rows of size 1, about, as draw_weight's
    weight = draw_weight(rows, columns, kind=bfloat16)
    for half in range(1 + gated):
        if kind == MXFP4:
            pack_experts(codes, packed, 0, scales, half, 1 + gated)
        else:
            pack_experts(weight.astype(kind), packed, 0, None, half, 1 + gated)
    packed.panels[1:] = packed.panels[0]
    return packed


@pytest.mark.parametrize("stored", [MXFP4, *KINDS], ids=["mxfp4", *map(str, KINDS)])
@pytest.mark.parametrize("tokens", [1, 8, 128])
def bench_moe(race, tokens, stored):
    kind = bfloat16 if stored == MXFP4 else stored
    gate_up, down = experts(INNER, HIDDEN, stored, True), experts(HIDDEN, INNER, stored, False)
    generator = np.random.default_rng(1)
    chosen = np.stack([generator.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)]).astype(np.int32)
    weights = np.full((tokens, CHOSEN), 1 / CHOSEN, np.float32)
    read = len(np.unique(chosen)) * (gate_up.nbytes + down.nbytes) // EXPERTS
    race(
        "moe",
        draw(tokens, HIDDEN, kind=kind),
        gate_up,
        down,
        chosen,
        weights,
        shape=f"{tokens} × {CHOSEN} of {EXPERTS}, {'mxfp4' if stored == MXFP4 else stored}",
        num_bytes=read,
        flops=2 * tokens * CHOSEN * 3 * HIDDEN * INNER,
        cold=True,
        # gate and up have the size 1, h and what the experts give too; two orders of 2880 float32 products differ by
        # some √K ulp of it, and h may be rounded to a bfloat16 beside: 2^-9 of it, which add up like √K / K.
        atol=1e-2 if kind == bfloat16 else 1e-4,
    )
