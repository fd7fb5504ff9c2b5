"""Images on their way into a prompt: what a model that sees wants of them, known without its weights."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pace.reference.arrays import Float


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

    def pixels(self, image: Image.Image) -> Float:
        """(3, height, width) float32: resized without regard to its shape (bilinear), rescaled, normalised."""
        height, width = self.size
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        values = np.asarray(resized, np.float32) / np.float32(255)
        normed = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normed.transpose(2, 0, 1), np.float32)
