"""From pixels to what stands for an image among a model's embeddings; the latest are kept."""

from collections import OrderedDict

from pace.models import Model
from pace.reference.arrays import Array

from .images import Pixels

KEPT_BYTES = 64 << 20  # some 50 images of Gemma 3 4B


class ImageEncoder:
    def __init__(self, model: Model, kept_bytes: int = KEPT_BYTES) -> None:
        self._model, self._kept_bytes = model, kept_bytes
        self._kept: OrderedDict[bytes, Array] = OrderedDict()  # the longest unused first

    def known(self, pixels: Pixels) -> Array | None:
        """Its rows, (tokens_per_image, hidden), where they are kept."""
        rows = self._kept.get(pixels.digest)
        if rows is not None:
            self._kept.move_to_end(pixels.digest)
        return rows

    def encode(self, pixels: Pixels) -> Array:
        """The same, by the model."""
        assert self._model.images is not None
        rows: Array = self._model.encode_images(self._model.images.normalised(pixels.values)[None])[0]
        self._kept[pixels.digest] = rows
        while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > self._kept_bytes:
            self._kept.popitem(last=False)
        return rows
