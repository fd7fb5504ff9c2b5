import numpy as np
import pytest

from benchmarks.case import KINDS, draw
from pace.reference.store_kv import kv_shapes

BLOCK_TOKENS, NUM_BLOCKS = 256, 4
# kv_heads, head_dim: Llama-3.2-1B, SmolLM2-135M.
MODELS = [(8, 64), (3, 64)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize(("kv_heads", "head_dim"), MODELS)
def bench_store_kv(race, kv_heads, head_dim, tokens, kind):
    k, v = (draw(tokens, kv_heads, head_dim, kind=kind, seed=seed) for seed in (0, 1))
    blocks = [np.zeros(shape, kind) for shape in kv_shapes(NUM_BLOCKS, kv_heads, BLOCK_TOKENS, head_dim, kind)]
    slots = np.arange(100, 100 + tokens)  # from within a block, as a prompt goes on
    contiguous = [np.zeros((NUM_BLOCKS * BLOCK_TOKENS, kv_heads, head_dim), kind) for _ in blocks]
    race(
        "store_kv",
        k,
        v,
        *blocks,
        slots,
        shape=f"{tokens} × {kv_heads} × {head_dim}",
        num_bytes=2 * (k.nbytes + v.nbytes),
        torch=torch_store_kv,
        torch_arguments=(k, v, *contiguous, slots),
        rtol=0,
        atol=0,  # elements move, nothing is rounded
    )


def torch_store_kv(k, v, keys, values, slots):
    keys.index_copy_(0, slots, k)
    values.index_copy_(0, slots, v)
