"""Images in prompts: from what users give to pixels, and from pixels to a place among the tokens.

Pillow is imported where an image is, and nowhere else.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .keys import key_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from pace.models.images import ImageProcessor

MAX_PIXELS = 1 << 26  # of an image as it comes: 8192 × 8192, some 200 MB while it is read
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow reads others by programs that it starts
NO_IMAGES = "the model takes text, and no images"


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image in the size that the model sees, (height, width, 3) uint8."""

    values: NDArray[np.uint8]

    @cached_property
    def digest(self) -> bytes:
        return blake2b(self.values.tobytes(), digest_size=16).digest()


Source = str | Path | bytes | Pixels | Any  # a path, a file's contents, pixels, or a PIL.Image.Image
Message = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """The tokens [begin, end) of a prompt stand for it."""

    begin: int
    end: int
    pixels: Pixels

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def keys(self) -> list[int]:
        """What the cache knows these tokens by."""
        return [key_of(self.pixels.digest, row) for row in range(len(self))]


# --- from what users give to pixels ---


def read(source: Source, processor: "ImageProcessor", max_pixels: int = MAX_PIXELS) -> Pixels:
    """An image as the model sees it: the first frame, in RGB, turned as it is stored.

    ValueError for what is no image, broken, empty or of more than `max_pixels`. ImportError without Pillow.
    """
    if isinstance(source, Pixels):
        return source
    image = _opened(source)
    width, height = image.size
    if not width * height:
        raise ValueError(f"an image is {width} × {height}: there is nothing to see")
    if width * height > max_pixels:
        raise ValueError(f"an image is {width} × {height}; the most are {max_pixels} pixels: make it smaller")
    try:
        return Pixels(processor.resized(_eight_bits(image)))
    except Exception as error:  # each format has its own
        raise _unreadable(error) from None


def _opened(source: Source) -> "Image":
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ImportError("images need Pillow: pip install 'pace[images]'") from None
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | Path | bytes):
        raise ValueError(f"an image is a {type(source).__name__}; it must be a path, bytes or a PIL.Image.Image")
    try:
        file = BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes())
        return Image.open(file, formats=FORMATS)
    except Exception as error:  # a warning of too many pixels too, where warnings are errors
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> ValueError:
    reason = str(error).partition(" <_io")[0] or type(error).__name__
    return ValueError(f"an image can't be read ({reason}): give a whole file, of {', '.join(FORMATS)}")


def _eight_bits(image: "Image") -> "Image":
    """Of 16 bits the upper 8: Pillow would take all above 255 for white."""
    from PIL import Image

    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))


def from_url(url: Any) -> bytes:
    """The file that a data: URL holds. ValueError for every other URL."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(
            f"an image has the URL {str(url)[:40]!r}; nothing is fetched: put the image itself there, "
            "data:image/png;base64,…"
        )
    head, _, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError(f"an image has the URL {head[:40]!r}; it must begin as data:image/png;base64,… does")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"an image's data: URL is not base64 ({error})") from None


# --- into a prompt ---


def taken(messages: Sequence[Message]) -> tuple[list[Message], list[Source]]:
    """Messages as chat templates know them, {"type": "image"} where an image stands, and the images, in order.

    A part with one is {"type": "image", "image": …}, or as OpenAI has it {"type": "image_url", "image_url": {"url":
    "data:…"}}. ValueError for one that holds none.
    """
    sources: list[Source] = []

    def plain(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("image", "image_url"):
            return part
        if part.get(kind) is None:
            raise ValueError(f"a part of type {kind} needs {kind}")
        value = part[kind]
        if kind == "image_url":
            value = from_url(value.get("url") if isinstance(value, Mapping) else value)
        sources.append(value)
        return {"type": "image"}

    def without(message: Message) -> Message:
        content = message.get("content")
        if not isinstance(content, list | tuple):
            return message
        return {**message, "content": [plain(part) for part in content]}

    return [without(message) for message in messages], sources


def expanded(text: str, count: int, processor: "ImageProcessor") -> str:
    """With the tokens of an image in place of each placeholder, of which there must be `count`. ValueError."""
    found = text.count(processor.placeholder)
    if found != count:
        raise ValueError(
            f"there are {count} images and {found} placeholders {processor.placeholder!r} in the prompt: "
            "write one for each image, and nowhere else"
        )
    return text.replace(processor.placeholder, processor.expansion)


def place(tokens: Sequence[int], images: Sequence[Pixels], processor: "ImageProcessor") -> tuple[PlacedImage, ...]:
    """Where images stand in a prompt, in order. ValueError unless it has tokens for just those."""
    found = [at for at, token in enumerate(tokens) if token == processor.token_id]
    count = processor.tokens_per_image
    runs = found[::count], [at + 1 for at in found[count - 1 :: count]]
    whole = len(found) == count * len(images) and all(b - a == count for a, b in zip(*runs, strict=True))
    if not whole:
        raise ValueError(
            f"there are {len(images)} images, and {len(found)} tokens {processor.token!r} in the prompt; an image has "
            f"{count} of them, one after the other"
        )
    return tuple(PlacedImage(*place) for place in zip(*runs, images, strict=True))
