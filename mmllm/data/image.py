"""Images of any origin to the pixels that CLIP was trained on, with every limit on images.

The dangerous image is a small one: one pixel wide and 40,000 high, it passes every limit on bytes and pixels, and
"shortest edge to 224" makes it 224 x 8,960,000. So the aspect ratio is limited too, and very long images are cropped
before they are resized.

The arithmetic is that of transformers' `CLIPImageProcessor` on PIL, bit for bit: convert to RGB, resize the shortest edge
to `size` by bicubic on uint8, centre crop with offsets rounded down, then (u8 / 255 - mean) / std in float32.
"""

import base64
import binascii
import re
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmllm.errors import CheckpointError, ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # never EPS: Pillow would start Ghostscript
MAX_MEGAPIXELS = 50
MAX_ASPECT = 200
CROP_FIRST_ASPECT = 16  # beyond it, crop before resizing: bounds memory, pixels may differ slightly from CLIP's
BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)

ImageLike = str | Path | bytes | Image.Image  # a path or data URI, a path, encoded bytes, a PIL image


@dataclass(frozen=True)
class ImageProcessor:
    """`processor(image)` returns float32 pixels (3, size, size). The defaults are CLIP's."""

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, config: dict) -> "ImageProcessor":
        """From a preprocessor_config.json, whose sizes are numbers (as published by OpenAI) or dictionaries (newer)."""
        config = config.get("image_processor", config)
        size, crop = config.get("size", cls.size), config.get("crop_size", cls.size)
        size = size.get("shortest_edge") if isinstance(size, dict) else size
        sides = {crop["height"], crop["width"]} if isinstance(crop, dict) else {crop}
        if sides != {size} or config.get("resample", 3) != Image.Resampling.BICUBIC:
            raise CheckpointError(
                f"preprocessor_config.json: shortest edge {size}, crop {sorted(sides)}, resample "
                f"{config.get('resample', 3)}; only a square crop of the shortest edge by bicubic (3) is supported"
            )
        return cls(size, tuple(config.get("image_mean", cls.mean)), tuple(config.get("image_std", cls.std)))

    def to_dict(self) -> dict:
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(self, image: ImageLike) -> Tensor:
        """Raises ImageError when `image` cannot be used."""
        cropped = self.crop(decode(image))
        pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def crop(self, image: Image.Image) -> Image.Image:
        """The central `size` x `size` square of an RGB image."""
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if long > CROP_FIRST_ASPECT * short:
            image = center_crop(image, min(width, CROP_FIRST_ASPECT * short), min(height, CROP_FIRST_ASPECT * short))
            width, height = image.size
            long = max(width, height)
        edge = int(self.size * long / short)
        wanted = (self.size, edge) if width <= height else (edge, self.size)
        if wanted != image.size:
            image = image.resize(wanted, Image.Resampling.BICUBIC)
        return center_crop(image, self.size, self.size)


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The central `width` x `height` pixels; offsets are rounded down."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def decode(source: ImageLike, name: str = "image") -> Image.Image:
    """An upright RGB image: EXIF rotation applied, alpha over white, the first frame of an animation.

    `source` is a path, a data URI, encoded bytes, or a PIL image; a URL is never fetched.
    Raises ImageError whose message shows nothing of the libraries underneath.
    """
    if isinstance(source, Image.Image):
        check_size(source, name)
        return to_rgb(ImageOps.exif_transpose(source), name)
    if isinstance(source, str) and source[:5].lower() == "data:":
        source = decode_base64(source)
    elif isinstance(source, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source):
        raise ImageError(f"{name}: a URL; nothing is fetched here, send the image itself", "image_url_not_supported")
    if not isinstance(source, bytes):
        name, source = str(source), read_bytes(Path(source))
    if not source:
        raise ImageError(f"{name}: empty; there is no image in it", "empty_image")
    image = open_checked(source, name)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except BROKEN as error:
        raise ImageError(f"{name}: broken or cut off; save or send it again", "corrupt_image") from error
    return to_rgb(upright, name)


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"no such image: {path}", "no_such_image") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: a directory; name one image in it", "no_such_image") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read; check its permissions", "unreadable_image") from error


def open_checked(data: bytes, name: str) -> Image.Image:
    """Opens the header and checks the size before a single pixel is decoded."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image of a supported format; use {', '.join(FORMATS)} (convert HEIC and SVG first)",
            "unsupported_image",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: more than {MAX_MEGAPIXELS} megapixels; resize it first", "image_too_large"
        ) from error
    except BROKEN as error:
        raise ImageError(f"{name}: broken or cut off; save or send it again", "corrupt_image") from error
    check_size(image, name)
    return image


def check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise ImageError(
            f"{name}: {width} x {height} is {width * height / 1e6:.0f} megapixels, at most {MAX_MEGAPIXELS}; resize it first",
            "image_too_large",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name}: {width} x {height} is longer than {MAX_ASPECT}:1; cut it into pieces first", "image_aspect"
        )


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB from any mode. 16 bits become 8 by division (Pillow would clip them to white); float images have no scale."""
    if image.mode == "F":
        raise ImageError(f"{name}: float pixels have no agreed range; save it with 8 or 16 bits", "unsupported_image")
    if image.mode.startswith("I"):
        grey = np.array(image).astype(np.int64)
        image = Image.fromarray((grey // 257 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB")


def decode_base64(text: str) -> bytes:
    """The bytes of base64 text, bare or as a data URI. The media type of a URI is ignored: the content decides."""
    header, comma, body = text.partition(",")
    if text[:5].lower() == "data:":
        if not comma or not header.lower().endswith(";base64"):
            raise ImageError("image_base64: not a base64 data URI; use data:image/jpeg;base64,...", "invalid_base64")
        text = body
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("image_base64: not base64; check its alphabet and padding", "invalid_base64") from error
