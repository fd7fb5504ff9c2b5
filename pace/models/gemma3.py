"""Gemma 3 that sees: what a SigLIP tower makes of an image, averaged and projected, stands in the text for it."""

from math import isqrt

import numpy as np

from pace.errors import ModelError
from pace.reference.arrays import Array, Float

from . import siglip
from .config import Config
from .gemma3_text import Gemma3Text, windows
from .images import ImageProcessor
from .siglip import Siglip
from .weights import Weights

BEGIN, TOKEN, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"


class Gemma3(Gemma3Text):
    def __init__(self, config: Config, weights: Weights) -> None:
        # Checkpoints differ in how deep the parts lie: language_model.model or model.language_model, vision_tower or
        # vision_tower.vision_model.
        text = prefix(weights, "embed_tokens.weight", "language_model.model.").removesuffix(".")
        super().__init__(config, weights, text, prefix(weights, "lm_head.weight", "language_model.") + "lm_head")
        self._see(config, weights)
        self.weight_bytes = weights.nbytes

    @classmethod
    def usual(cls, config: Config) -> Config:
        text, tied = super().usual(config), config.values.get("tie_word_embeddings")
        return text if tied is None else Config({**text.values, "tie_word_embeddings": tied})

    @classmethod
    def processor(cls, config: Config) -> ImageProcessor:
        count, size = config.integer("mm_tokens_per_image", 256), vision_of(config).integer("image_size")
        return ImageProcessor(
            placeholder=BEGIN,
            expansion=f"\n\n{BEGIN}{TOKEN * count}{END}\n\n",
            token=TOKEN,
            token_id=config.integer("image_token_index", 262_144),
            tokens_per_image=count,
            size=(size, size),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )

    def encode_images(self, pixels: Float) -> Array:
        wanted = (self._tower.channels, self._tower.image_size, self._tower.image_size)
        if pixels.ndim != 4 or pixels.shape[1:] != wanted or pixels.dtype != np.float32:
            raise ValueError(f"pixels is {pixels.dtype} {pixels.shape}; it must be float32 (images, {str(wanted)[1:]}")
        rows = np.empty((len(pixels), self._side**2, self._project.weight.out_features), self.dtype)
        for image, out in zip(pixels, rows, strict=True):  # one at a time: what lies between is a hundred times as much
            out[...] = self._project(self._norm(self._averaged(self._tower(image))))
        return rows

    def _see(self, config: Config, weights: Weights) -> None:
        vision, self.images = vision_of(config), self.processor(config)
        self._tower = Siglip(
            vision, weights, prefix(weights, "embeddings.patch_embedding.weight", "vision_tower.vision_model.")
        )
        self._side = tokens_per_side(self.images, self._tower.side)
        self._check_text(config, self.images)
        name = prefix(weights, "mm_soft_emb_norm.weight", "multi_modal_projector.")
        seen, hidden = self._tower.hidden, self.usual(config).integer("hidden_size")
        self._norm = weights.rms_norm(f"{name}mm_soft_emb_norm", seen, vision.number("layer_norm_eps"), offset=1)
        self._project = weights.reshaped_linear(
            "linear", f"{name}mm_input_projection_weight", (seen, hidden), lambda weight: weight.T
        )

    def _check_text(self, config: Config, images: ImageProcessor) -> None:
        """ModelError for what would be seen wrongly."""
        if images.token_id >= self.vocabulary:
            raise ModelError(
                f"image_token_index in config.json is {images.token_id}; it must be below vocab_size {self.vocabulary}"
            )
        window = min((window for window in windows(self.usual(config)) if window is not None), default=None)
        if window is not None and window < images.tokens_per_image:  # a span is seen whole, whatever the window
            raise ModelError(
                f"sliding_window in config.json is {window}; it must hold the {images.tokens_per_image} of an image"
            )

    def _averaged(self, patches: Array) -> Array:
        """Squares of patches, each to one: (tokens_per_image, hidden)."""
        size = self._tower.side // self._side
        squares = patches.reshape(self._side, size, self._side, size, -1).astype(np.float32)
        averages: Array = squares.mean(axis=(1, 3)).reshape(self._side**2, -1)
        return averages.astype(self.dtype)


def vision_of(config: Config) -> Config:
    return siglip.usual(Config(config.values.get("vision_config") or {}))


def tokens_per_side(images: ImageProcessor, patches: int) -> int:
    """ModelError unless an image's tokens are a square that divides that of its patches."""
    side = isqrt(images.tokens_per_image)
    if side**2 != images.tokens_per_image or patches % side:
        raise ModelError(
            f"mm_tokens_per_image in config.json is {images.tokens_per_image}; it must be a square "
            f"that divides {patches} × {patches} patches evenly"
        )
    return side


def prefix(weights: Weights, ending: str, usual: str) -> str:
    """What stands before `ending` in the name of a tensor; `usual`, for the error to come, where there is none."""
    return next((name.removesuffix(ending) for name in weights.checkpoint.names() if name.endswith(ending)), usual)
