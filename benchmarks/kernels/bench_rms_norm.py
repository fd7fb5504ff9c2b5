import pytest

from benchmarks.case import KINDS, draw

# Llama-3.2-1B, one token and a chunk of prefill; SmolLM2-135M.
SHAPES = [(1, 2048), (512, 2048), (1, 576), (512, 576)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def bench_rms_norm(race, tokens, hidden, kind):
    x, weight = draw(tokens, hidden, kind=kind), draw(hidden)
    race(
        "rms_norm",
        x,
        weight,
        shape=f"{tokens} × {hidden}",
        num_bytes=2 * x.nbytes + weight.nbytes,
        torch=torch_rms_norm,
    )


def torch_rms_norm(x, weight):
    from torch.nn.functional import rms_norm

    return rms_norm(x, weight.shape, weight.to(x.dtype), 1e-5)
