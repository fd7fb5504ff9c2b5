import pytest

from benchmarks.case import KINDS, draw

# Llama-3.2-1B's MLP and Llama-3.1-8B's, one token and a chunk of prefill.
SHAPES = [(1, 8192), (512, 8192), (1, 14336), (512, 14336)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tokens", "features"), SHAPES)
def bench_activate(race, tokens, features, kind):
    gate, up = draw(tokens, features, kind=kind), draw(tokens, features, kind=kind, seed=1)
    race(
        "activate",
        gate,
        "silu",
        up,
        shape=f"{tokens} × {features}",
        num_bytes=3 * gate.nbytes,
        torch=torch_activate,
    )


def torch_activate(gate, _, up):
    from torch.nn.functional import silu

    return silu(gate) * up
