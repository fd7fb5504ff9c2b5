"""DYNAMIC: contiguous, doubled whenever it is full."""

import numpy as np

from pace.ops import OperatorConfig
from pace.reference.store_kv import GROUP

from .base import CacheShape, Longs, check_block_tokens
from .contiguous import Contiguous


class Dynamic(Contiguous):
    """A sequence begins with `block_tokens` tokens, and doubles up to the longest that there can be."""

    def __init__(
        self,
        shape: CacheShape,
        capacity_bytes: int,
        operators: OperatorConfig,
        block_tokens: int | None = None,
        prefix_caching: bool | None = None,
    ) -> None:
        step = GROUP if block_tokens is None else check_block_tokens(block_tokens)
        super().__init__(shape, capacity_bytes, operators, step, prefix_caching)

    def _grown(self, steps: Longs) -> Longs:
        doublings = np.frexp(np.maximum(steps - 1, 0))[1].astype(np.int64)  # the bits of steps - 1
        return np.left_shift(1, doublings)
