import pytest

from benchmarks.case import KINDS, draw

# Logits of Llama-3.2-1B, and of its experts' kin; scores of 32 heads over 4096 keys.
SHAPES = [(1, 128256), (8, 128256), (32, 4096)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def bench_softmax(race, rows, columns, kind):
    x = draw(rows, columns, kind=kind)
    race("softmax", x, shape=f"{rows} × {columns}", num_bytes=2 * x.nbytes, torch=torch_softmax)


def torch_softmax(x):
    return x.softmax(dim=1)
