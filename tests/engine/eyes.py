"""A stand-in for the part of a model that sees; of NumPy alone, for server processes too."""

import numpy as np

from pace.models.images import ImageProcessor

IMAGE = ImageProcessor(
    placeholder="[image]",
    expansion="\n" + "<pad>" * 7 + "\n",
    token="<pad>",
    token_id=0,
    tokens_per_image=7,
    size=(6, 5),
    mean=(0.5, 0.4, 0.3),
    std=(0.5, 0.6, 0.7),
)


class Eyes:
    """Each row of an image is a random projection of all its pixels."""

    def __init__(self, hidden, dtype):
        self.shape, self.dtype = (1, 7, hidden), dtype
        generator = np.random.default_rng(0)
        self.projection = generator.standard_normal((3 * 6 * 5, 7 * hidden)).astype(np.float32) / 9

    def __call__(self, pixels):
        assert pixels.shape == (1, 3, 6, 5), pixels.shape
        return (pixels.reshape(1, -1) @ self.projection).reshape(self.shape).astype(self.dtype)
