import numpy as np
import pytest

from benchmarks.case import KINDS, draw

# heads, kv_heads, head_dim, rotary_dim, interleaved
LLAMA_1B = (32, 8, 64, 64, False)
GPT_J = (16, 16, 256, 64, True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("model", [LLAMA_1B, GPT_J], ids=["llama-1b", "gpt-j"])
def bench_rope(race, model, tokens, kind):
    heads, kv_heads, head_dim, rotary_dim, interleaved = model
    q, k = draw(tokens, heads, head_dim, kind=kind), draw(tokens, kv_heads, head_dim, kind=kind, seed=1)
    cos, sin = tables(tokens + 1, rotary_dim)
    positions = np.arange(1, tokens + 1, dtype=np.int32)
    rotated = (q.nbytes + k.nbytes) * rotary_dim // head_dim
    race(
        "rope",
        q,
        k,
        cos,
        sin,
        positions,
        interleaved,
        shape=f"{tokens} × {heads}+{kv_heads} × {head_dim}",
        num_bytes=2 * rotated + 2 * tokens * rotary_dim // 2 * 4,
        torch=torch_rope,
    )


def tables(positions, rotary_dim):
    frequencies = 10000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    angles = np.arange(positions)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def torch_rope(q, k, cos, sin, positions, interleaved):
    """As eager models do it, and in place."""
    import torch

    c, s = cos[positions][:, None].to(q.dtype), sin[positions][:, None].to(q.dtype)
    half = cos.shape[1]
    for x in (q, k):
        turned = x[..., : 2 * half]
        x1, x2 = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
        y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
        turned.copy_(torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1))
