"""Caches of a small model, attention in float64 to hold them against, and how much memory they really have."""

import ctypes

import numpy as np

from pace.cache import CACHES, CacheShape
from pace.cache.contiguous import Contiguous, page_tokens, rounded
from pace.cache.memory import PAGE
from pace.ops import OperatorConfig
from tests.kernels.arrays import BF16, F32

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 2, 2, 3, 32
SCALE = 0.3
MAX_TOKENS = 1 << 11
# As in tests/kernels/test_attend.py.
TOLERANCE = {F32: {"rtol": 2e-5, "atol": 2e-6}, BF16: {"rtol": 2**-6, "atol": 2**-6}}


def shape(kind=F32, max_tokens=MAX_TOKENS):
    return CacheShape(LAYERS, KV_HEADS, HEAD_DIM, kind, max_tokens)


def block_of(name, kind=F32, block_tokens=16):
    """What a block of so many tokens comes to: contiguous caches grow by whole pages."""
    return rounded(block_tokens, page_tokens(shape(kind))) if issubclass(CACHES[name], Contiguous) else block_tokens


def make(name, kind=F32, block_tokens=16, blocks=6, **options):
    capacity = blocks * block_of(name, kind, block_tokens) * shape(kind).bytes_per_token
    return CACHES[name](shape(kind), capacity, OperatorConfig(), block_tokens, **options)


def attended(q, keys, values):
    """Causal attention of the last len(q) tokens, in float64. keys, values: (tokens, kv_heads, head_dim)."""
    q, keys, values = (array.astype(np.float64) for array in (q, keys, values))
    grouped = q.reshape(len(q), KV_HEADS, GROUP, HEAD_DIM)
    scores = SCALE * np.einsum("qhgd,khd->hgqk", grouped, keys)
    own = np.arange(len(keys) - len(q), len(keys))[:, None]
    weights = np.exp(np.where(np.arange(len(keys)) <= own, scores - scores.max(axis=-1, keepdims=True), -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hgqk,khd->qhgd", weights, values).reshape(q.shape)


def fill(cache, sequence, count, kind=F32, value=1.0):
    """Append tokens and write the same key and value for each, in all layers; returns what the last layer attended."""
    placement = cache.append([sequence], [count])
    k = np.full((count, KV_HEADS, HEAD_DIM), value, kind)
    q = np.ones((count, KV_HEADS * GROUP, HEAD_DIM), kind)
    return [cache.attend(layer, q, k, k, placement, SCALE) for layer in range(LAYERS)][-1]


def resident_bytes(cache):
    """What the system has given for a cache's memory. For Linux."""
    memory = cache._memory.bytes
    pages = np.zeros(-(-memory.nbytes // PAGE), np.uint8)
    address, length = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes)
    assert ctypes.CDLL(None).mincore(address, length, ctypes.c_void_p(pages.ctypes.data)) == 0
    return int((pages & 1).sum()) * PAGE
