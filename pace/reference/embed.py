"""Token embeddings, read from the packed weight that a tied output head needs anyway."""

import numpy as np

from .arrays import Array, check_vector, f32, output_rows
from .pack_linear import PackedLinear, unpack_linear


def embed(tokens: Array, table: PackedLinear, scale: float = 1.0, out: Array | None = None) -> Array:
    """y[i] = scale · table[tokens[i]].

    tokens: (tokens,) int32. table: (vocabulary, hidden). Returns (tokens, hidden) of table's dtype, in `out` where
    it is given. scale is a float32; the product is rounded once, to table's dtype, and with a scale of 1 bits are
    copied.

    ValueError for a token that the table does not have (named), or another shape; TypeError for another dtype.
    """
    check_vector(tokens, "tokens", len(tokens), np.int32)
    if table.gated:
        raise ValueError("table is gated; it must be a plain weight")
    for token in tokens:
        if not 0 <= token < table.out_features:
            raise ValueError(f"token {token} is outside the vocabulary of {table.out_features}")
    result = output_rows(out, len(tokens), table.in_features, table.dtype)
    wanted, place = np.unique(tokens, return_inverse=True)
    panels = PackedLinear(table.panels[wanted // 16], len(wanted) * 16, table.in_features)
    rows = unpack_linear(panels)[np.arange(len(wanted)) * 16 + wanted % 16][place]
    result[...] = rows if scale == 1 else f32(rows) * np.float32(scale)
    return result
