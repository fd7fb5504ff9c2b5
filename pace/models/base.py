"""What the engine knows of a model."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from pace.cache import CacheShape, KVCache, Placement
from pace.cache.base import Ints
from pace.ops.registry import Dtype
from pace.reference.arrays import Array, Float

from .config import Config

if TYPE_CHECKING:
    from .images import ImageProcessor
    from .weights import Weights


class Model(ABC):
    """An architecture with its weights. It keeps nothing of a sequence: keys and values are the cache's."""

    dtype: Dtype
    cache_shape: CacheShape
    vocabulary: int
    max_positions: int
    weight_bytes: int  # all that is kept
    step_bytes: int  # of these, what a step reads, if it reads all experts
    expert_bytes: int = 0  # of these, the experts'
    chosen_share: float = 1.0  # of the experts, those that a token chooses
    images: "ImageProcessor | None" = None  # of a model that sees
    # Texts of more tokens than that have other rotary positions (`placement.text_lengths`); with `stretched_whole`,
    # from their first token on: a text that grows so long is computed anew.
    stretched_beyond: int | None = None
    stretched_whole: bool = False

    @abstractmethod
    def __init__(self, config: Config, weights: "Weights") -> None: ...

    @classmethod
    def usual(cls, config: Config) -> Config:
        """The language model's configuration, under the names that most have."""
        return config.text

    @classmethod
    def processor(cls, config: Config) -> "ImageProcessor | None":
        """What it wants of images; None where it takes none."""
        return None

    def bytes_of_step(self, tokens: int = 1) -> int:
        """Weights that a step of so many tokens reads, where all experts are as likely to be chosen."""
        return self.step_bytes - round(self.expert_bytes * (1 - self.chosen_share) ** tokens)

    @abstractmethod
    def forward(
        self, tokens: Ints, placement: Placement, cache: KVCache, seen: tuple[Ints, Array] | None = None
    ) -> Array:
        """Hidden states of new tokens, (tokens, hidden): those of all sequences end to end, as `placement` says.

        seen: indices of tokens, and what stands there instead of their embeddings, (indices, hidden): rows of images.
        """

    def encode_images(self, pixels: Float) -> Array:
        """What images (images, 3, height, width) float32 become: (images, tokens_per_image, hidden) of `dtype`."""
        raise ValueError(f"{type(self).__name__} takes no images: use a model that does")

    @abstractmethod
    def logits(self, hidden: Array) -> Float:
        """(rows, vocabulary) float32, for the rows asked for."""
