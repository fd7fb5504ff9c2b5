"""A llama that sees. An image that is white from end to end is more than it can bear."""

import numpy as np

from pace.models.llama import Llama
from tests.engine.eyes import IMAGE, Eyes


class Seeing(Llama):
    images = IMAGE

    @classmethod
    def processor(cls, config):
        return IMAGE

    def encode_images(self, pixels):
        if (pixels == IMAGE.normalised(np.full((6, 5, 3), 255, np.uint8))).all():
            raise RuntimeError("it is too bright")
        return Eyes(72, self.dtype)(pixels)
