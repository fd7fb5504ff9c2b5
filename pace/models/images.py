"""Images on their way into a prompt: what a model that sees wants of them, known without its weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pace.reference.arrays import Float

if TYPE_CHECKING:  # who has an image has Pillow; who has none may lack it
    from PIL import Image


@dataclass(frozen=True)
class ImageProcessor:
    """How images become pixels, and what stands for them in a prompt.

    A chat template writes `placeholder` where an image goes; it becomes `expansion`, which holds `token` as often as
    the model has rows of an image, `tokens_per_image`. All of them see each other.
    """

    placeholder: str
    expansion: str
    token: str
    token_id: int
    tokens_per_image: int
    size: tuple[int, int]  # height and width that the model sees
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def pixels(self, image: "Image.Image") -> Float:
        """(3, height, width) float32: the bits of transformers' processors that use Pillow."""
        return self.normalised(self.resized(image))

    def resized(self, image: "Image.Image") -> NDArray[np.uint8]:
        """(height, width, 3): RGB, resized without regard to its shape (bilinear)."""
        from PIL.Image import Resampling

        height, width = self.size
        return np.asarray(image.convert("RGB").resize((width, height), Resampling.BILINEAR))

    def normalised(self, values: NDArray[np.uint8]) -> Float:
        """(3, height, width) float32 of (height, width, 3): rescaled to 0 … 1, less the mean, by the deviation."""
        rescaled = (values.astype(np.float64) * (1 / 255)).astype(np.float32)
        normed = (rescaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normed.transpose(2, 0, 1), np.float32)
