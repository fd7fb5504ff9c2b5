import numpy as np
import pytest

from benchmarks.case import BF16, F32, KINDS, draw
from pace.kernels import store_kv
from pace.reference.store_kv import kv_shapes

BLOCK_TOKENS = 256
# heads, kv_heads, head_dim: Llama-3.2-1B, SmolLM2-135M.
MODELS = [(32, 8, 64), (9, 3, 64)]
# queries, keys: a token early and late in a conversation; a chunk of prefill.
BATCHES = [(1, 1024), (1, 8192), (512, 512)]

# float32: exp within an ulp, sums in another order. bfloat16: numerators are rounded to 8 bits relative to another
# running maximum, the result once more.
RTOL = {F32: 2e-5, BF16: 2**-6}
# The same of what is near 0: a mean of n values has the size n^-1/2, and the errors of its terms a few times their ulp
# of that.
ATOL = {F32: 1e-5, BF16: 2**-6}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), MODELS)
def bench_attend(race, heads, kv_heads, head_dim, queries, keys, kind):
    q = draw(queries, heads, head_dim, kind=kind)
    k, v = (draw(keys, kv_heads, head_dim, kind=kind, seed=seed) for seed in (1, 2))
    fewest_keys = keys - queries + 1
    race(
        "attend",
        q,
        *paged(k, v),
        np.array([0, queries], np.int32),
        np.array([keys], np.int32),
        head_dim**-0.5,
        shape=f"{queries} on {keys} × {heads}/{kv_heads} × {head_dim}",
        num_bytes=2 * q.nbytes + k.nbytes + v.nbytes,
        flops=4 * q.size * (fewest_keys + keys) // 2,
        torch=torch_attend,
        torch_arguments=tuple(np.ascontiguousarray(x.swapaxes(0, 1)[None]) for x in (q, k, v)),
        cold=True,
        rtol=RTOL[kind],
        atol=ATOL[kind] * fewest_keys**-0.5,
    )


def paged(k, v):
    """k_blocks, v_blocks and the table of one sequence, whose blocks lie in any order among others."""
    tokens, kv_heads, head_dim = k.shape
    order = np.random.default_rng(0).permutation(tokens // BLOCK_TOKENS + 2).astype(np.int32)
    blocks = [np.zeros(shape, k.dtype) for shape in kv_shapes(len(order), kv_heads, BLOCK_TOKENS, head_dim, k.dtype)]
    table = order[: tokens // BLOCK_TOKENS]
    slots = (table[:, None].astype(np.int64) * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).ravel()
    store_kv(k, v, *blocks, slots)
    return *blocks, table[None]


def torch_attend(q, k, v):
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
