"""Images with their captions in memory, and random batches of them."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmllm.data.image import ImageProcessor, decode
from mmllm.data.samples import Sample

SMALLEST_CROP = 0.4  # of an image's area, with `augment`
WIDEST_CROP = 4 / 3  # width to height
JITTER = 0.3  # how much brightness, contrast and saturation change at most

Captions = list[list[list[int]]]  # for each image the token ids of each of its captions


class CaptionedImages:
    """Images in memory as uint8, larger than the tower takes them, and the ids of their captions.

    A random crop has the tower's size, or with `augment` any size and shape and other colors, as in
    https://arxiv.org/abs/1409.4842.
    """

    def __init__(
        self,
        samples: list[Sample],
        encode: Callable[[str], list[int]],
        image_processor: ImageProcessor,
        augment: bool = False,
    ):
        lists: dict[Path, dict[tuple[str, ...], None]] = {}  # all captions of an image, or the answers of each question
        for sample in samples:
            lists.setdefault(sample.images[0], {})[sample.references] = None
        captions = {path: [text for texts in of_one for text in texts] for path, of_one in lists.items()}
        self.size, self.augment = image_processor.size, augment
        side = self.size * 3 // 2 if augment else self.size * 8 // 7
        larger = ImageProcessor(side, image_processor.mean, image_processor.std)
        self.pixels = torch.stack([to_uint8(larger.crop(decode(path))) for path in captions])
        self.captions = [[encode(text) for text in texts] for texts in captions.values()]
        said = [{word for text in texts for word in text.lower().split()} for texts in captions.values()]
        self.can_flip = [not {"left", "right"} & words for words in said]
        self.mean = torch.tensor(image_processor.mean)[:, None, None]
        self.std = torch.tensor(image_processor.std)[:, None, None]

    def batch(self, size: int, rng: random.Random) -> tuple[Tensor, Captions]:
        """A random batch: random crops, half of them mirrored where no caption says left or right, with all captions."""
        crops, captions = [], []
        for i in rng.sample(range(len(self.pixels)), size):
            crop = self.crop(self.pixels[i], rng)
            crops.append(crop.flip(-1) if self.can_flip[i] and rng.random() < 0.5 else crop)
            captions.append(self.captions[i])
        x_B3SS = torch.stack(crops).float() / 255
        if self.augment:
            x_B3SS = jitter(x_B3SS, rng)
        return (x_B3SS - self.mean) / self.std, captions

    def crop(self, pixels_3SS: Tensor, rng: random.Random) -> Tensor:
        side, height, width = pixels_3SS.shape[-1], self.size, self.size
        if self.augment:
            area, stretch = rng.uniform(SMALLEST_CROP, 1), rng.uniform(-1, 1) * math.log(WIDEST_CROP)
            height, width = (min(side, round(side * math.sqrt(area * math.exp(x)))) for x in (stretch, -stretch))
        top, left = rng.randint(0, side - height), rng.randint(0, side - width)
        crop = pixels_3SS[:, top : top + height, left : left + width]
        if self.augment:
            crop = F.interpolate(crop[None].float(), (self.size, self.size), mode="bilinear", antialias=True)[0]
        return crop


def jitter(x_B3SS: Tensor, rng: random.Random) -> Tensor:
    """Images from 0 to 1 with another brightness, contrast and saturation each."""
    gains = torch.tensor([[rng.uniform(1 - JITTER, 1 + JITTER) for _ in x_B3SS] for _ in range(3)])
    brightness, contrast, saturation = gains[:, :, None, None, None]
    x_B3SS = x_B3SS * brightness
    x_B3SS = x_B3SS.mean((1, 2, 3), keepdim=True).lerp(x_B3SS, contrast)
    return x_B3SS.mean(1, keepdim=True).lerp(x_B3SS, saturation).clamp(0, 1)


def to_uint8(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
