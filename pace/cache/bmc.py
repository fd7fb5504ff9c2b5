"""BMC, balancing memory and compute: contiguous, grown in about √n steps of √n tokens for sequences of up to n."""

from math import isqrt

from pace.ops import OperatorConfig

from .base import CacheShape, Longs, check_block_tokens
from .contiguous import Contiguous


class BMC(Contiguous):
    """A step is `block_tokens`, or the longest sequence in so many `splits`."""

    def __init__(
        self,
        shape: CacheShape,
        capacity_bytes: int,
        operators: OperatorConfig,
        block_tokens: int | None = None,
        prefix_caching: bool | None = None,
        splits: int | None = None,
    ) -> None:
        if splits is not None and (splits < 1 or block_tokens is not None):
            raise ValueError(f"splits is {splits}; it must be 1 or more, and given without block_tokens")
        if block_tokens is not None:
            step = check_block_tokens(block_tokens)
        elif splits is not None:
            step = -(-shape.max_tokens // splits)
        else:
            step = shape.max_tokens // isqrt(shape.max_tokens)
        super().__init__(shape, capacity_bytes, operators, step, prefix_caching)

    def _grown(self, steps: Longs) -> Longs:
        return steps
