import pytest

from benchmarks.case import F32, KINDS, RTOL, draw, draw_weight
from pace.kernels import pack_linear

# Llama-3.2-1B: QKV, down. OPT-1.3B: the first layer of the MLP. SmolLM2-135M: QKV, down.
LAYERS = {
    "2048 → 3072": (2048, 3072, ()),
    "8192 → 2048, residual": (8192, 2048, ("residual",)),
    "2048 → 8192, relu": (2048, 8192, ("bias", "relu")),
    "576 → 960": (576, 960, ()),
    "1536 → 576, residual": (1536, 576, ("residual",)),
}

# x and the weight have the size 1 and K^-1/2, so that results have the size 1: the two orders of a float32 sum differ
# by some √K ulp of it. RTOL covers the rounding to bfloat16.
ATOL = 1e-5


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("layer", LAYERS)
def bench_linear(race, layer, tokens, kind):
    in_features, out_features, extras = LAYERS[layer]
    x, weight = draw(tokens, in_features, kind=kind), draw_weight(out_features, in_features, kind=kind)
    bias = draw(out_features, seed=2) if "bias" in extras else None
    activation = "relu" if "relu" in extras else None
    residual = draw(tokens, out_features, kind=kind, seed=3) if "residual" in extras else None
    after = (bias, activation, None, residual)
    race(
        "linear",
        x,
        pack_linear(weight),
        *after,
        shape=f"{tokens} × {layer}",
        num_bytes=x.nbytes + weight.nbytes + tokens * out_features * kind.itemsize * (1 + ("residual" in extras)),
        flops=2 * tokens * weight.size,
        torch=torch_linear,
        torch_arguments=(x, weight, None if bias is None else bias.astype(kind), *after[1:]),
        cold=True,
        atol=ATOL,
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def bench_linear_head(race, kind):
    """The logits of SmolLM2-135M, in float32; of a chunk, only the last token's are wanted."""
    x, weight = draw(1, 576, kind=kind), draw_weight(49152, 576, kind=kind)
    race(
        "linear",
        x,
        pack_linear(weight),
        *(None, None, None, None, F32),
        shape="1 × 576 → 49152, fp32",
        num_bytes=x.nbytes + weight.nbytes + 49152 * F32.itemsize,
        flops=2 * weight.size,
        torch=lambda x, weight: torch_linear(x, weight).float(),
        torch_arguments=(x, weight),
        cold=True,
        rtol=RTOL[F32],
        atol=ATOL,
    )


def torch_linear(x, weight, bias=None, activation=None, multiply=None, residual=None):
    from torch.nn import functional

    y = functional.linear(x, weight, bias)
    if activation:
        y = getattr(functional, activation)(y, inplace=True)
    return y if residual is None else y.add_(residual)
