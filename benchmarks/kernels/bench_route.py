import numpy as np
import pytest

from benchmarks.case import draw


@pytest.mark.parametrize("experts", [32, 128])
@pytest.mark.parametrize("tokens", [1, 512])
def bench_route(race, tokens, experts):
    logits = draw(tokens, experts, kind=np.dtype(np.float32))
    race("route", logits, 4, shape=f"{tokens} × 4 of {experts}", num_bytes=logits.nbytes, torch=torch_route)


def torch_route(logits, k):
    values, indices = logits.topk(k, dim=-1)
    return indices.int(), values.softmax(dim=-1)
