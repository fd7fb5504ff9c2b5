"""SLAB_POOL: one pool of blocks for all sequences, each block as large as a core's cache likes it."""

from pace import host
from pace.ops import OperatorConfig

from .base import CacheShape, check_block_tokens
from .shared import SharedBlocks

BLOCK_TOKENS = (256, 128, 64, 32)


def block_tokens_for(shape: CacheShape, l2_bytes: int) -> int:
    """The largest block whose keys and values, of the one head that a work item reads, fit a quarter of L2."""
    per_token = 2 * shape.head_dim * shape.dtype.itemsize
    return next((tokens for tokens in BLOCK_TOKENS if tokens * per_token <= l2_bytes // 4), BLOCK_TOKENS[-1])


class SlabPool(SharedBlocks):
    """Forks share blocks; prompts that begin alike do where prefix_caching asks for it."""

    def __init__(
        self,
        shape: CacheShape,
        capacity_bytes: int,
        operators: OperatorConfig,
        block_tokens: int | None = None,
        prefix_caching: bool | None = None,
    ) -> None:
        if block_tokens is None:
            block_tokens = block_tokens_for(shape, host.describe().l2_bytes or 512 * 1024)
        super().__init__(shape, capacity_bytes, operators, check_block_tokens(block_tokens), prefix_caching is True)
