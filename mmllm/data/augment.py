"""Random parts of training images: a few thousand photographs are seen from more sides than they were taken from.

A part is at least SMALLEST of the image as the tower would see it, up to WIDEST times as wide as high or the reverse,
stretched to the tower's square; half of them are mirrored where no text about the image says left or right. It is a pure
function of (seed, epoch, file name), so a resumed run sees the same.

Random parts: https://arxiv.org/abs/1409.4842 (which goes down to 8 % of the area, too little for what captions say).
"""

import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from mmllm.data.image import ImageProcessor, decode
from mmllm.data.samples import Sample

SMALLEST = 0.6  # of the area
WIDEST = 4 / 3
SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


class RandomParts:
    """`of_epoch(epoch)` reads image files for `BatchLoader`: pixels (3, S, S) of a random part."""

    def __init__(self, image_processor: ImageProcessor, samples: Iterable[Sample], seed: int):
        self.image_processor, self.seed = image_processor, seed
        self.larger = replace(image_processor, size=image_processor.size * 3 // 2)
        self.has_sides = {
            path
            for sample in samples
            for path in sample.images
            if any(SIDES.search(message.text) for each in (sample, *sample.shared) for message in each.messages)
        }

    def of_epoch(self, epoch: int) -> Callable[[Path], Tensor]:
        def read(path: Path) -> Tensor:
            rng = random.Random(f"{self.seed} {epoch} {path.name}")
            return self.image_processor.to_pixels(self.part(self.larger.crop(decode(path)), path, rng))

        return read

    def part(self, square: Image.Image, path: Path, rng: random.Random) -> Image.Image:
        area, stretch = rng.uniform(SMALLEST, 1), rng.uniform(-1, 1) * math.log(WIDEST)
        side, size = square.width, self.image_processor.size
        width, height = (min(side, side * math.sqrt(area * math.exp(x))) for x in (stretch, -stretch))
        left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
        part = square.resize((size, size), self.image_processor.resample, (left, top, left + width, top + height))
        return ImageOps.mirror(part) if path not in self.has_sides and rng.random() < 0.5 else part
