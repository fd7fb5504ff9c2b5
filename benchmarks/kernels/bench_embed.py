import numpy as np
import pytest

from benchmarks.case import KINDS, draw
from pace.kernels import pack_linear

# Llama-3.2-1B, an eighth of its vocabulary (rows that no token names are not read); SmolLM2-135M. torch's rows lie
# together, so that the few that are named stay in cache; the rows of a panel share lines of it.
TABLES = [(16384, 2048), (49152, 576)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize(("vocabulary", "hidden"), TABLES)
def bench_embed(race, vocabulary, hidden, tokens, kind):
    table = draw(vocabulary, hidden, kind=kind)
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens, np.int32)
    race(
        "embed",
        ids,
        pack_linear(table),
        shape=f"{tokens} of {vocabulary} × {hidden}",
        num_bytes=2 * tokens * hidden * kind.itemsize,
        torch=torch_embed,
        torch_arguments=(ids, table),
        cold=True,
        rtol=0,
        atol=0,  # rows are copied
    )


def torch_embed(tokens, table):
    from torch.nn.functional import embedding

    return embedding(tokens, table)
