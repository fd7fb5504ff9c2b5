"""PAGED: small blocks, shared wherever sequences have the same tokens."""

from pace.ops import OperatorConfig

from .base import CacheShape, check_block_tokens
from .shared import SharedBlocks

BLOCK_TOKENS = 64  # with 16, which lie scattered in memory, attention reads at little more than half the speed


class Paged(SharedBlocks):
    """Prompts that begin alike share blocks, unless prefix_caching says no."""

    def __init__(
        self,
        shape: CacheShape,
        capacity_bytes: int,
        operators: OperatorConfig,
        block_tokens: int | None = None,
        prefix_caching: bool | None = None,
    ) -> None:
        block_tokens = BLOCK_TOKENS if block_tokens is None else check_block_tokens(block_tokens)
        super().__init__(shape, capacity_bytes, operators, block_tokens, prefix_caching is not False)
