import numpy as np
import pytest

from benchmarks.case import KINDS, draw
from pace.kernels import pack_linear

# Llama-3.2-1B, an eighth of its vocabulary (rows that no token names are not read); SmolLM2-135M; Gemma 3 1B, whose
# rows are scaled by √hidden. torch's rows lie
# together, so that the few that are named stay in cache; the rows of a panel share lines of it.
TABLES = [(16384, 2048, 1.0), (49152, 576, 1.0), (16384, 1152, 34.0)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize(("vocabulary", "hidden", "scale"), TABLES)
def bench_embed(race, vocabulary, hidden, scale, tokens, kind):
    table = draw(vocabulary, hidden, kind=kind)
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens, np.int32)
    race(
        "embed",
        ids,
        pack_linear(table),
        scale,
        shape=f"{tokens} of {vocabulary} × {hidden}{', scaled' if scale != 1 else ''}",
        num_bytes=2 * tokens * hidden * kind.itemsize,
        torch=torch_embed,
        torch_arguments=(ids, table, scale),
        cold=True,
        rtol=0,
        atol=0,  # rows are copied, or multiplied and rounded in one way
    )


def torch_embed(tokens, table, scale):
    from torch.nn.functional import embedding

    rows = embedding(tokens, table)
    return rows if scale == 1 else rows * scale
