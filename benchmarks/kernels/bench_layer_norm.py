import pytest

from benchmarks.case import KINDS, draw

# OPT-1.3B and GPT-J-6B, one token and a chunk of prefill.
SHAPES = [(1, 2048), (512, 2048), (1, 4096), (512, 4096)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def bench_layer_norm(race, tokens, hidden, kind):
    x = draw(tokens, hidden, kind=kind)
    weight, bias = draw(hidden, seed=1), draw(hidden, seed=2)
    race(
        "layer_norm",
        x,
        weight,
        bias,
        shape=f"{tokens} × {hidden}",
        num_bytes=2 * x.nbytes + weight.nbytes + bias.nbytes,
        torch=torch_layer_norm,
    )


def torch_layer_norm(x, weight, bias):
    from torch.nn.functional import layer_norm

    return layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
