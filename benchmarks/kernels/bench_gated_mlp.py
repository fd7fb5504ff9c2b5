import numpy as np
import pytest

from benchmarks.case import KINDS, draw, draw_weight
from pace.kernels import pack_linear
from pace.reference.pack_linear import PackedLinear

# Llama-3.2-1B, SmolLM2-135M.
SHAPES = [(2048, 8192), (576, 1536)]

# gate and up have the size 1; two orders of their float32 sums differ by some √K ulp of it. RTOL covers the rounding to
# bfloat16.
ATOL = 2e-5


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize(("hidden", "inner"), SHAPES)
def bench_gated_mlp(race, hidden, inner, tokens, kind):
    x, weight = draw(tokens, hidden, kind=kind), draw_weight(2 * inner, hidden, kind=kind)
    packed = PackedLinear.empty(inner, hidden, kind, gated=True)
    for first_panel, half in enumerate(np.split(weight, 2)):
        pack_linear(half, packed, first_panel, 2)
    race(
        "gated_mlp",
        x,
        packed,
        shape=f"{tokens} × {hidden} → {inner}",
        num_bytes=x.nbytes + weight.nbytes + tokens * inner * kind.itemsize,
        flops=2 * tokens * weight.size,
        torch=torch_gated_mlp,
        torch_arguments=(x, weight),
        cold=True,
        atol=ATOL,
    )


def torch_gated_mlp(x, weight):
    """gate and up in one product."""
    from torch.nn.functional import linear, silu

    gate, up = linear(x, weight).chunk(2, dim=-1)
    return silu(gate) * up
