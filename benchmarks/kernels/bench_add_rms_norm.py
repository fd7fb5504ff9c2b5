import pytest

from benchmarks.case import KINDS, draw

# Llama-3.2-1B, one token and a chunk of prefill; SmolLM2-135M.
SHAPES = [(1, 2048), (512, 2048), (1, 576), (512, 576)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def bench_add_rms_norm(race, tokens, hidden, kind):
    x, residual = draw(tokens, hidden, kind=kind), draw(tokens, hidden, kind=kind, seed=1)
    weight = draw(hidden)
    race(
        "add_rms_norm",
        x,
        residual,
        weight,
        shape=f"{tokens} × {hidden}",
        num_bytes=4 * x.nbytes + weight.nbytes,
        torch=torch_add_rms_norm,
    )


def torch_add_rms_norm(x, residual, weight):
    from torch.nn.functional import rms_norm

    return rms_norm(residual.add_(x), weight.shape, weight.to(x.dtype), 1e-5)
