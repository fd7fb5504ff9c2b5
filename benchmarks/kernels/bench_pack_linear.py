import pytest

from benchmarks.case import KINDS, draw
from pace.reference.pack_linear import PANEL, PackedLinear

# The down projections of Llama-3.2-1B and SmolLM2-135M, and the latter's embeddings.
SHAPES = [(2048, 8192), (576, 1536), (49152, 576)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def bench_pack_linear(race, rows, columns, kind):
    weight = draw(rows, columns, kind=kind)
    into = PackedLinear.empty(rows, columns, kind)
    into.panels.fill(0)  # so that no page is touched for the first time while the clock runs
    race(
        "pack_linear",
        weight,
        into,
        shape=f"{rows} × {columns}",
        num_bytes=2 * weight.nbytes,
        torch=torch_pack_linear,
        torch_arguments=(weight, into.panels),
        cold=True,
        rtol=0,
        atol=0,  # elements move, nothing is rounded
    )


def torch_pack_linear(weight, panels):
    rows, columns = weight.shape
    pair = 4 // weight.itemsize
    elements = weight.view(rows // PANEL, PANEL, columns // pair, pair).transpose(1, 2)
    return panels.view(elements.shape).copy_(elements)
