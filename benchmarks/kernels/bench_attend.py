from dataclasses import dataclass

import numpy as np
import pytest

from benchmarks.case import BF16, F32, KINDS, draw
from pace.kernels import store_kv
from pace.reference.store_kv import kv_shapes

BLOCK_TOKENS = 256


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    window: int | None = None
    sinks: bool = False

    def __str__(self) -> str:
        seen = f", window {self.window}" * (self.window is not None) + ", sinks" * self.sinks
        return f"{self.queries} on {self.keys} × {self.heads}/{self.kv_heads} × {self.head_dim}{seen}"

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees, of one head."""
        seen = np.arange(self.keys - self.queries + 1, self.keys + 1)
        return int(np.minimum(seen, self.window or self.keys).sum())

    @property
    def keys_read(self) -> int:
        return min(self.keys, (self.window or self.keys) + self.queries - 1)


CASES = [
    # Llama-3.2-1B and SmolLM2-135M: a token early and late in a conversation; a chunk of prefill.
    *(Case(*model, *batch) for model in ((32, 8, 64), (9, 3, 64)) for batch in ((1, 1024), (1, 8192), (512, 512))),
    # A token late in a long one: 1, 4 and 8 query heads a key head. Two key heads, since the twin takes a while.
    *(Case(2 * group, 2, 128, 1, keys) for group in (1, 4, 8) for keys in (8192, 65536)),
    Case(8, 2, 64, 1, 65536),
    Case(8, 2, 128, 8, 16384),  # several tokens at once, as speculation proposes
    Case(4, 1, 128, 4096, 4096),  # a whole prompt; one key head, or the twin takes a minute
    # gpt-oss: every other layer has a window of 128, all have sinks.
    Case(64, 8, 64, 1, 8192, window=128, sinks=True),
    Case(64, 8, 64, 512, 512, window=128, sinks=True),
]

# float32: exp within an ulp, sums in another order. bfloat16: numerators are rounded to 8 bits relative to another
# running maximum, the result once more.
RTOL = {F32: 2e-5, BF16: 2**-6}
# The same of what is near 0: a mean of n values has the size n^-1/2, and the errors of its terms a few times their ulp
# of that; the twin adds them one after the other, so that of 65536 float32 it loses a few hundred.
ATOL = {F32: 5e-5, BF16: 2**-6}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_attend(race, case, kind):
    q = draw(case.queries, case.heads, case.head_dim, kind=kind)
    k, v = (draw(case.keys, case.kv_heads, case.head_dim, kind=kind, seed=seed) for seed in (1, 2))
    fewest_keys = min(case.keys - case.queries + 1, case.window or case.keys)
    race(
        "attend",
        q,
        *paged(k, v),
        np.array([0, case.queries], np.int32),
        np.array([case.keys], np.int32),
        case.head_dim**-0.5,
        case.window,
        draw(case.heads, seed=3) if case.sinks else None,
        shape=str(case),
        num_bytes=2 * q.nbytes + 2 * k[: case.keys_read].nbytes,
        flops=4 * case.heads * case.head_dim * case.pairs,
        torch=None if case.sinks else torch_attend,
        torch_arguments=(*(np.ascontiguousarray(x.swapaxes(0, 1)[None]) for x in (q, k, v)), mask_of(case)),
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


def mask_of(case):
    """Where torch needs one: several queries, and keys before them."""
    if not 1 < case.queries < case.keys:
        return None
    return np.tri(case.queries, case.keys, case.keys - case.queries, dtype=bool)


def torch_attend(q, k, v, mask):
    from torch.nn.functional import scaled_dot_product_attention

    causal = mask is None and q.shape[2] > 1
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
