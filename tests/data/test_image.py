"""Pixels against CLIP's own processor, and everything that an image can be wrong in."""

import base64
import errno
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.GifImagePlugin import GifImageFile
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mmllm.data import image as module
from mmllm.data.image import ImageProcessor, decode, decode_base64
from mmllm.errors import CheckpointError, ImageError

REFERENCE = CLIPImageProcessorPil()
SIZES = [(224, 224), (640, 480), (481, 640), (225, 224), (223, 900), (1, 1), (1, 2), (2, 1), (37, 5), (3, 40)]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = {"RGB": 3, "L": 1, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    values = np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(
        values[:, :, 0] if bands == 1 else values, mode=None if mode in ("RGB", "RGBA", "L") else mode
    )


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference(image: Image.Image) -> torch.Tensor:
    return REFERENCE(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_those_of_clips_processor(size):
    image = noise(*size)
    assert torch.equal(ImageProcessor()(encoded(image)), reference(image))


@pytest.mark.parametrize("name", ["candle_bike.jpg", "CLIP.png", "000000039769.png"])
def test_pixels_of_photographs_are_those_of_clips_processor(shared, name):
    path = shared(f"images/{name}")
    with Image.open(path) as image:
        wanted = reference(decode(path) if image.mode == "RGBA" else image.convert("RGB"))
    assert torch.equal(ImageProcessor()(path), wanted)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_become_the_rgb_that_pillow_makes(mode):
    image = noise(40, 30, mode)
    assert torch.equal(ImageProcessor()(image), reference(image.convert("RGB")))


def test_a_palette_image_has_its_colors():
    image = noise(40, 30).quantize(17)
    assert torch.equal(ImageProcessor()(encoded(image)), reference(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_over_white(mode):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((0, 0, 3, 7), fill=(0, 0, 0, 255))
    if mode == "P":
        paletted = image.convert("RGB").quantize(2)
        hidden = paletted.getpixel((7, 7))
        rgb = decode(encoded(paletted, transparency=hidden))
    else:
        rgb = decode(image.convert("LA") if mode == "LA" else image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((7, 7)) == (255, 255, 255) and rgb.getpixel((0, 0)) == (0, 0, 0)


def test_a_palette_with_alpha_lies_over_white():
    assert decode(Image.new("PA", (8, 8), (3, 0))).getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    got = np.asarray(decode(encoded(Image.fromarray(grey))))[:, :, 0]
    assert np.array_equal(got, grey // 257)


def test_32_bits_that_hold_bytes_stay_bytes():
    grey = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert np.array_equal(np.asarray(decode(Image.fromarray(grey)))[:, :, 0], grey)


def test_float_pixels_are_refused():
    with pytest.raises(ImageError, match="float pixels"):
        decode(Image.fromarray(np.zeros((4, 4), dtype=np.float32)))


def test_grey_is_read_by_the_bit_depth_of_the_file():
    dark = np.full((4, 4), 255, dtype=np.uint16)
    assert decode(encoded(Image.fromarray(dark))).getpixel((0, 0)) == (0, 0, 0)


def test_transparent_16_bit_grey_lies_over_white():
    grey = np.full((4, 4), 1000, dtype=np.uint16)
    grey[0] = 0
    rgb = decode(encoded(Image.fromarray(grey), transparency=0))
    assert rgb.getpixel((0, 0)) == (255, 255, 255) and rgb.getpixel((0, 1)) == (3, 3, 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_a_large_image_shrinks_in_bands_as_it_would_whole(mode, monkeypatch):
    image = noise(301, 203, "RGBA" if mode == "RGBA" else "RGB")
    image = image.quantize(17) if mode == "P" else image.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    data = encoded(image)
    whole = decode(data)
    monkeypatch.setattr(module, "LARGE_MEGAPIXELS", 0.01)
    monkeypatch.setattr(module, "LARGE_SIDE", 60)
    shrunk = decode(data, is_bounded=True)
    assert shrunk.size == (101, 68) and decode(data).size == (301, 203)
    assert np.array_equal(np.asarray(shrunk), np.asarray(whole.reduce(3)))


def test_a_large_jpeg_is_decoded_at_a_smaller_size(monkeypatch):
    monkeypatch.setattr(module, "LARGE_MEGAPIXELS", 0.01)
    monkeypatch.setattr(module, "LARGE_SIDE", 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.linear_gradient("L").resize((400, 240))
    data = encoded(image, "JPEG", exif=exif)
    assert decode(data, is_bounded=True).size == (60, 100) and decode(data).size == (240, 400)


def test_a_bounded_webp_has_a_lower_limit():
    data = encoded(Image.new("L", (4200, 4200)), "WEBP")
    with pytest.raises(ImageError, match="18 megapixels, at most 16 as WEBP"):
        decode(data, is_bounded=True)
    assert decode(data).size == (4200, 4200)


def test_avif_is_read():
    assert decode(encoded(Image.new("RGB", (8, 8), "red"), "AVIF")).size == (8, 8)


def test_heic_is_read_upright_where_pillow_heif_is_installed():
    heif = pytest.importorskip("pillow_heif")
    gradient = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    heif.from_pillow(gradient).save(file, quality=95, exif=exif.tobytes())
    image = decode(file.getvalue())
    assert image.size == (32, 48), "telephones store the sensor's rows and how to turn them"
    difference = np.asarray(image).astype(int) - np.asarray(gradient.transpose(Image.Transpose.ROTATE_270))
    assert abs(difference).max() <= 8
    with pytest.raises(ImageError, match="broken or cut off"):
        decode(file.getvalue()[:-200])


def test_heic_without_pillow_heif_is_refused_with_what_would_read_it(monkeypatch):
    monkeypatch.setattr(module, "reads_heic", lambda: False)
    with pytest.raises(ImageError, match="pip install pillow-heif") as caught:
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert caught.value.code == "unsupported_image"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_stands_upright(orientation):
    """A camera stores the sensor's rows and how to turn them: undo each of the eight ways."""
    upright = noise(20, 30)
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    turned = upright if stored is None else upright.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode(encoded(turned, exif=exif))
    assert got.size == upright.size and np.array_equal(np.asarray(got), np.asarray(upright))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"]
)
def test_orientation_that_means_nothing_is_ignored(exif):
    assert decode(encoded(noise(20, 30), "JPEG", exif=exif)).size == (20, 30)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert decode(data).getpixel((4, 4)) == (255, 0, 0)


def test_of_ten_thousand_frames_one_is_read(monkeypatch):
    frames = [Image.new("P", (8, 8), i % 2) for i in range(10_000)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], optimize=False)
    monkeypatch.setattr(GifImageFile, "seek", lambda self, frame: pytest.fail(f"frame {frame} was asked for"))
    assert data.count(b",") == 10_000  # what every frame begins with
    assert decode(data).size == (8, 8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def pointless_png(width: int, height: int) -> bytes:
    """A PNG whose header promises far more than it holds."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def with_long_text() -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "a" * 70_000_000, zip=True)
    return encoded(Image.new("RGB", (4, 4)), pnginfo=info)


def with_large_profile() -> bytes:
    return encoded(Image.new("RGB", (4, 4)), icc_profile=bytes(70_000_000))


def tiled_tiff(side: int, tile: int) -> bytes:
    """A grey TIFF of `side` x `side` pixels in one compressed tile of `tile` x `tile`."""
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: 16}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 24) + bytes(16) + struct.pack("<H", len(tags)) + entries + bytes(4)


def palette_png(transparency: int) -> bytes:
    """A PNG whose tRNS chunk is longer than its palette, with only its last entry transparent."""

    data = encoded(noise(8, 8).quantize(4))
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk(b"tRNS", b"\xff" * transparency + b"\0") + data[at:]


BAD = {
    "empty": (b"", "empty_image"),
    "text": (b"hello, I am not an image", "unsupported_image"),
    "html": (b"<html><body>not found</body></html>", "unsupported_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "unsupported_image"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "unsupported_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unsupported_image"),
    "zip": (b"PK\x03\x04" + bytes(40), "unsupported_image"),
    "JPEG XL": (b"\xff\x0a\x1f\x07\x44" + bytes(40), "unsupported_image"),
    "cut off PNG": (encoded(noise(60, 60))[:-900], "corrupt_image"),
    "cut off JPEG": (encoded(noise(60, 60), "JPEG")[:900], "corrupt_image"),
    "header only": (encoded(noise(60, 60))[:20], "corrupt_image"),
    "bomb": (pointless_png(10_000, 10_000), "image_too_large"),
    "huge bomb": (pointless_png(60_000, 60_000), "image_too_large"),
    "one pixel wide": (pointless_png(1, 40_000), "image_aspect"),
    "70 MB of comment": (with_long_text(), "corrupt_image"),
    "70 MB of profile": (with_large_profile(), "corrupt_image"),
    "palette index out of range": (palette_png(transparency=300), "corrupt_image"),
    "damaged PNG chunk": (encoded(noise(60, 60)).replace(b"IHDR", b"IHDX"), "corrupt_image"),
    "progressive JPEG of 101 scans": (encoded(noise(8, 8), "JPEG") + b"\xff\xda" * 100, "image_too_complex"),
    "TIFF with a huge tile": (tiled_tiff(16, 10_000), "image_too_complex"),
}


@pytest.mark.parametrize(("data", "code"), BAD.values(), ids=BAD.keys())
def test_a_bad_image_is_refused_with_its_code_and_nothing_of_the_libraries(data, code):
    with pytest.raises(ImageError) as caught:
        ImageProcessor()(data)
    assert caught.value.code == code, str(caught.value)
    for word in ("PIL", "0x", "BytesIO", "Traceback"):
        assert word not in str(caught.value)


def test_a_very_long_image_takes_little_memory(monkeypatch):
    """200:1 is allowed; it is cropped before it is resized, so the largest image ever made stays small."""
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: made.append(size) or resize(self, size, *rest))
    assert ImageProcessor()(Image.new("RGB", (10, 2000), "red")).shape == (3, 224, 224)
    assert max(width * height for width, height in made) <= 224 * 224 * module.CROP_FIRST_ASPECT


def test_long_images_give_the_same_middle_as_clips_processor():
    image = noise(10, 10).resize((60, 1500), Image.Resampling.BICUBIC)
    assert torch.equal(ImageProcessor()(image), reference(image))


@pytest.mark.parametrize(
    "address", ["http://169.254.169.254/latest", "https://example.org/x.jpg", "file:///etc/passwd", "FTP://x/y"]
)
def test_nothing_is_ever_fetched(address):
    with pytest.raises(ImageError) as caught:
        decode(address)
    assert caught.value.code == "image_url_not_supported"


def test_base64_bare_or_as_a_data_uri_with_any_claim():
    data = encoded(noise(4, 4))
    text = base64.b64encode(data).decode()
    broken_up = "\n".join(text[i : i + 20] for i in range(0, len(text), 20))
    for form in (text, broken_up, f"data:image/jpeg;base64,{text}", f"DATA:text/plain;BASE64,{text}"):
        assert decode_base64(form) == data
    assert decode(f"data:image/png;base64,{text}").size == (4, 4)


@pytest.mark.parametrize(
    "text", ["????", "abc", "_-_-", "data:image/png,plain", "data:image/png;base64", "/etc/passwd=="]
)
def test_what_is_not_base64_is_refused(text):
    with pytest.raises(ImageError) as caught:
        decode_base64(text)
    assert caught.value.code == "invalid_base64"


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ImageError, match="no such image: .*x.jpg"):
        decode(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="a directory"):
        decode(tmp_path)


def test_the_configuration_of_clip_is_read_in_both_its_forms():
    official = {"size": 224, "crop_size": 224, "resample": 3, "do_center_crop": True}
    assert ImageProcessor.from_dict(official) == ImageProcessor()
    assert ImageProcessor.from_dict(REFERENCE.to_dict()) == ImageProcessor()
    assert ImageProcessor.from_dict(ImageProcessor(336).to_dict()) == ImageProcessor(336)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resample": 1}, "resample is 1; it must be 2 or 3"),
        ({"crop_size": {"height": 224, "width": 200}}, "only one square size"),
        ({"size": 256}, "only one square size"),
        ({"size": "224", "crop_size": "224"}, "size is '224'"),
        ({"size": [224], "crop_size": [224]}, "size is"),
        ({"do_resize": False}, "do_resize is False; only True"),
        ({"do_center_crop": False}, "do_center_crop is False; only True"),
        ({"do_pad": True}, "do_pad is True; only False"),
        ({"do_rescale": False}, "do_rescale is False; only True"),
        ({"do_normalize": False}, "do_normalize is False; only True"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784"),
        ({"rescale_factor": "x"}, "rescale_factor is 'x'"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"image_processor": 3}, "image_processor is 3"),
    ],
)
def test_what_would_make_other_pixels_is_refused_by_name(change, named):
    with pytest.raises(CheckpointError, match=named):
        ImageProcessor.from_dict(ImageProcessor().to_dict() | change)


@pytest.mark.parametrize("resample", [2, 3])
def test_the_pixels_of_siglip_are_those_of_transformers(resample):
    theirs = SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=resample)
    ours = ImageProcessor.from_dict(theirs.to_dict())
    assert ours == ImageProcessor.from_dict(ours.to_dict())
    for size in ((50, 40), (31, 200), (48, 48), (3, 3)):
        image = Image.effect_noise(size, 80).convert("RGB")
        wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(ours(image), wanted), size


@pytest.mark.parametrize("mean", [module.MEAN, (0.5, 0.5, 0.5)], ids=["CLIP", "SigLIP"])
def test_the_pixels_of_a_padded_image_are_those_of_transformers_llava(mean):
    square = {"height": 48, "width": 48}
    theirs = LlavaImageProcessorPil(size={"shortest_edge": 48}, crop_size=square, do_pad=True, image_mean=mean)
    ours = ImageProcessor(48, mean, fit="pad")
    for content in (theirs.to_dict(), ours.to_dict()):
        assert ImageProcessor.from_dict(content) == ours
    for size in ((50, 40), (31, 200), (48, 48), (3, 3), (1, 200), (640, 481)):
        image = noise(*size)
        assert torch.equal(ours(image), theirs(image, return_tensors="pt")["pixel_values"][0]), size


def test_a_long_image_shrinks_before_it_is_padded(monkeypatch):
    """Padded whole, an image of 20 megapixels could take 4 gigapixels."""
    monkeypatch.setattr(module, "PADDED_SIDE", 400)
    made, new = [], Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: made.append(size) or new(mode, size, *rest))
    image = ImageProcessor(48, fit="pad").crop(new("RGB", (2000, 200), "red"))
    assert made == [(400, 400)]
    assert image.getpixel((0, 24))[0] > 200 and image.getpixel((24, 0)) == (122, 116, 104)


def test_the_warnings_of_pillow_are_left_as_they_were():
    before = list(warnings.filters)
    with pytest.raises(ImageError):
        decode(pointless_png(10_000, 10_000))
    assert warnings.filters == before


def test_a_read_that_fails_is_tried_once_more(tmp_path, monkeypatch):
    """As on a network drive. What fails twice is an error."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    read, failures = Path.read_bytes, [True, False, True, True]

    def read_bytes(path):
        if failures.pop(0):
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert decode(tmp_path / "x.png").size == (8, 8)
    with pytest.raises(ImageError, match="x.png: cannot be read"):
        decode(tmp_path / "x.png")
