"""Images of any origin to the pixels that CLIP was trained on, with every limit on images.

The dangerous image is a small one: one pixel wide and 40,000 high, it passes every limit on bytes and pixels, and
"shortest edge to 224" makes it 224 x 8,960,000. So the aspect ratio is limited too, and very long images are cropped
before they are resized.

The arithmetic is that of transformers' `CLIPImageProcessor` on PIL, bit for bit: convert to RGB, resize the shortest edge
to `size` by bicubic on uint8, centre crop with offsets rounded down, then (u8 / 255 - mean) / std in float32. SigLIP's
resizes both edges to `size`, whatever the aspect ratio; LLaVA's can pad the image to a square first.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from mmllm.config.validation import shown
from mmllm.errors import CheckpointError, ImageError
from mmllm.runtime.files import refuse_other, typed

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # never EPS: Pillow would start Ghostscript
MAX_MEGAPIXELS = 50
BOUNDED_MEGAPIXELS = {"progressive JPEG": 32, "WEBP": 16, "AVIF": 20, "HEIF": 20}  # the decoder needs several copies
MAX_ASPECT = 200
CROP_FIRST_ASPECT = 16  # beyond it, crop before resizing: bounds memory, pixels may differ slightly from CLIP's
LARGE_MEGAPIXELS = 16  # of a bounded image; beyond it, shrink while decoding: pixels may differ slightly from CLIP's
LARGE_SIDE = 896  # pixels that a shrunk side keeps, where it has them
BAND = 32  # rows of a large image that are converted together
MAX_SCANS = 100  # of a progressive JPEG, which usually has 10; each costs a pass over all pixels
PADDED_SIDE = 4000  # of a square that an image is padded to; a longer image shrinks first: pixels may differ slightly
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1")  # bytes 4 to 12 of such a file
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageLike = str | Path | bytes | Image.Image  # a path or data URI, a path, encoded bytes, a PIL image


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
Positive = Annotated[float, Field(gt=0)]
PROCESSORS = {"crop": "CLIPImageProcessor", "stretch": "SiglipImageProcessor", "pad": "LlavaImageProcessor"}


@dataclass(frozen=True)
class _PixelFields:
    """What a preprocessor_config.json says about pixels, besides what is fixed."""

    size: Annotated[int, Field(ge=1, le=4096)]
    resample: Literal[2, 3] = 3
    image_mean: tuple[float, float, float] = MEAN
    image_std: tuple[Positive, Positive, Positive] = STD


@dataclass(frozen=True)
class ImageProcessor:
    """`processor(image)` returns float32 pixels (3, size, size). The defaults are CLIP's.

    `fit` "crop" resizes the shortest edge and cuts out the center; "stretch" resizes both edges; "pad" resizes the longest
    edge and fills the rest with the mean color.
    """

    size: int = 224
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    fit: Literal["crop", "stretch", "pad"] = "crop"
    resample: int = 3  # Pillow's number: 2 is bilinear, 3 bicubic

    @classmethod
    def from_dict(cls, config: dict, where: str | Path = "preprocessor_config.json") -> "ImageProcessor":
        """From a preprocessor_config.json, whose sizes are numbers (as published by OpenAI) or dictionaries (newer).

        CheckpointError names what would make other pixels.
        """
        config = config.get("image_processor") or config
        if not isinstance(config, dict):
            raise CheckpointError(f"{where}: image_processor is {shown(config)}; it must be a group of settings")
        size, crop = config.get("size") or cls.size, config.get("crop_size")
        fit = "stretch" if isinstance(size, dict) and "height" in size else "crop"
        if str(config.get("image_processor_type")).startswith(PROCESSORS["pad"]) and config.get("do_pad"):
            fit = "pad"
        wanted = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
        wanted |= {"rescale_factor": 1 / 255, "do_pad": fit == "pad"}
        if fit != "stretch":
            crop, wanted["do_center_crop"] = crop or cls.size, True
        elif not config.get("do_center_crop"):
            crop = None
        refuse_other(config, wanted, where)
        groups = [group.values() if isinstance(group, dict) else [group] for group in (size, crop)]
        sides = [side for group in groups for side in group if side is not None]
        if not sides or any(side != sides[0] for side in sides):
            raise CheckpointError(f"{where}: size {size} and crop_size {crop}; only one square size is supported")
        found = typed(_PixelFields, config | {"size": sides[0]}, where)
        return cls(found.size, found.image_mean, found.image_std, fit, found.resample)

    def to_dict(self) -> dict:
        is_stretch = self.fit == "stretch"
        square = {"height": self.size, "width": self.size}
        return {
            "image_processor_type": PROCESSORS[self.fit],
            "do_convert_rgb": True,
            **({"do_pad": True} if self.fit == "pad" else {}),
            "do_resize": True,
            "size": square if is_stretch else {"shortest_edge": self.size},
            "resample": self.resample,
            **({} if is_stretch else {"do_center_crop": True, "crop_size": square}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(self, image: ImageLike) -> Tensor:
        """Raises ImageError when `image` cannot be used."""
        return self.to_pixels(self.crop(decode(image)))

    def to_pixels(self, square: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def crop(self, image: Image.Image) -> Image.Image:
        """An RGB image of `size` x `size`: the central square of `image`, or all of it."""
        if self.fit == "pad":
            image = pad(image, tuple(int(255 * value) for value in self.mean))
        elif self.fit == "stretch":
            return image.resize((self.size, self.size), self.resample)
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if long > CROP_FIRST_ASPECT * short:
            image = center_crop(image, min(width, CROP_FIRST_ASPECT * short), min(height, CROP_FIRST_ASPECT * short))
            width, height = image.size
            long = max(width, height)
        edge = int(self.size * long / short)
        wanted = (self.size, edge) if width <= height else (edge, self.size)
        if wanted != image.size:
            image = image.resize(wanted, self.resample)
        return center_crop(image, self.size, self.size)


def pad(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """`image` in the middle of a square of `color`; offsets are rounded down."""
    image = image.reduce(-(-max(image.size) // PADDED_SIDE))
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The central `width` x `height` pixels; offsets are rounded down."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def decode(source: ImageLike, name: str = "image", *, is_bounded: bool = False) -> Image.Image:
    """An upright RGB image: EXIF rotation applied, alpha over white, the first frame of an animation.

    `source` is a path, a data URI, encoded bytes, or a PIL image; a URL is never fetched. `is_bounded`, for images that
    strangers send, limits the memory of decoding: large images shrink on the way, some formats have lower limits.
    Raises ImageError whose message shows nothing of the libraries underneath.
    """
    if isinstance(source, Image.Image):
        check_size(source, name)
        return upright(to_rgb(source, name), source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        source = decode_base64(source)
    elif isinstance(source, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source):
        raise ImageError(f"{name}: a URL; nothing is fetched here, send the image itself", "image_url_not_supported")
    if not isinstance(source, bytes):
        name, source = str(source), read_bytes(Path(source))
    if not source:
        raise ImageError(f"{name}: empty; there is no image in it", "empty_image")
    try:
        image = open_checked(source, name, is_bounded=is_bounded)
        factor = shrink_factor(image) if is_bounded else 1
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))  # JPEG decodes to a smaller size itself
            factor = shrink_factor(image)
        image.load()
        return upright(to_rgb(image, name) if factor == 1 else shrunk_rgb(image, name, factor), image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise ImageError(f"{name}: broken or cut off; save or send it again", "corrupt_image") from error


def shrink_factor(image: Image.Image) -> int:
    """1, or for a large image the factor by which both sides may shrink."""
    if image.width * image.height <= LARGE_MEGAPIXELS * 1_000_000:
        return 1
    return max(2, min(image.size) // LARGE_SIDE)


def shrunk_rgb(image: Image.Image, name: str, factor: int) -> Image.Image:
    """`to_rgb(image).reduce(factor)`, made band by band: converting a whole image takes several copies of it."""
    rows = BAND * factor
    peak = image.getextrema()[1] if image.mode == "I" else None
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(to_rgb(band, name, peak).reduce(factor), (0, top // factor))
    return result


def upright(image: Image.Image, original: Image.Image) -> Image.Image:
    """`image` turned as the EXIF data of `original` says; EXIF data that cannot be read does not matter."""
    try:
        orientation = original.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's EXIF reader raises anything; the pixels are good without it
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file. A read that fails is tried once more: network drives fail now and then."""
    try:
        try:
            return path.read_bytes()
        except OSError:
            return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"no such image: {path}", "no_such_image") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path}: a directory; name one image in it", "no_such_image") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read; check its permissions", "unreadable_image") from error


def open_checked(data: bytes, name: str, *, is_bounded: bool = False) -> Image.Image:
    """Opens the header and checks what decoding would cost before a single pixel is decoded."""
    try:
        image = Image.open(BytesIO(data), formats=(*FORMATS, "HEIF") if reads_heic() else FORMATS)
    except UnidentifiedImageError as error:
        if data.startswith(SIGNATURES) or (data[4:12] in HEIC and reads_heic()):
            raise ImageError(f"{name}: broken or cut off; save or send it again", "corrupt_image") from error
        raise ImageError(
            f"{name}: not an image of a supported format; use {', '.join(FORMATS)} (for HEIC: pip install pillow-heif)",
            "unsupported_image",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: more than {MAX_MEGAPIXELS} megapixels; resize it first", "image_too_large"
        ) from error
    check_size(image, name, is_bounded=is_bounded)
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    if scans > MAX_SCANS:
        message = f"{name}: a progressive JPEG of {scans} scans, at most {MAX_SCANS}; save it again"
        raise ImageError(message, "image_too_complex")
    if image.format == "TIFF":
        width, height = image.tag_v2.get(TILE_WIDTH, 0), image.tag_v2.get(TILE_LENGTH, 0)
        if width * height > LARGE_MEGAPIXELS * 1_000_000:
            raise ImageError(f"{name}: a TIFF with tiles of {width} x {height}; save it again", "image_too_complex")
    return image


@cache
def reads_heic() -> bool:
    """Whether pillow-heif is installed, which is then made known to Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


def check_size(image: Image.Image, name: str, *, is_bounded: bool = False) -> None:
    (width, height), kind = image.size, image.format
    if image.info.get("progressive"):
        kind = "progressive JPEG"
    most = BOUNDED_MEGAPIXELS.get(kind, MAX_MEGAPIXELS) if is_bounded else MAX_MEGAPIXELS
    if width * height > most * 1_000_000:
        size = f"{width} x {height} is {width * height / 1e6:.0f} megapixels"
        limit = f"at most {most} as {kind}" if most < MAX_MEGAPIXELS else f"at most {most}"
        raise ImageError(f"{name}: {size}, {limit}; resize it first", "image_too_large")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name}: {width} x {height} is longer than {MAX_ASPECT}:1; cut it into pieces first", "image_aspect"
        )


def to_rgb(image: Image.Image, name: str, peak: int | None = None) -> Image.Image:
    """RGB from any mode. 16 bits become 8 by division (Pillow would clip them to white); float images have no scale.

    32 bits count as 16 if the largest value, `peak` if it is known, does not fit 8.
    """
    if image.mode == "F":
        raise ImageError(f"{name}: float pixels have no agreed range; save it with 8 or 16 bits", "unsupported_image")
    if image.mode.startswith("I"):
        grey = np.array(image).astype(np.int64)
        is_16_bit = image.mode != "I" or (grey.max() if peak is None else peak) > 255
        grey8 = (grey // 257 if is_16_bit else grey).clip(0, 255)
        if isinstance(image.info.get("transparency"), int):
            grey8[grey == image.info["transparency"]] = 255  # over white
        image = Image.fromarray(grey8.astype(np.uint8))
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
