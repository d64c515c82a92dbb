"""Random parts of training images: a function of the epoch, at least so large, mirrored only where no side is named."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.config.schema import ExperimentConfig
from mmllm.data.augment import SMALLEST, WIDEST, RandomParts
from mmllm.data.batches import BatchLoader, ordered_batches
from mmllm.data.chat import ChatProcessor, assistant, user
from mmllm.data.image import MEAN, STD, ImageProcessor
from mmllm.data.samples import Sample
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import ConfigError
from official import write_tokenizer

EPOCHS = range(60)


@pytest.fixture
def slope(tmp_path) -> Path:
    """An image that gets redder to the right and greener downwards."""
    x = np.linspace(0, 255, 64)
    columns = np.stack([np.tile(x, (64, 1)), np.tile(x, (64, 1)).T, np.zeros((64, 64))], 2)
    Image.fromarray(columns.astype(np.uint8)).save(tmp_path / "slope.png")
    return tmp_path / "slope.png"


def parts_of(path: Path, text: str, size: int = 24) -> list[torch.Tensor]:
    """The part of each epoch, from 0 to 1."""
    other = Sample("1", (path,), (user("What?"), assistant(text)))
    sample = Sample("0", (path,), (user("Say."), assistant("A hill.")), shared=(other,))
    parts = RandomParts(ImageProcessor(size), [sample], seed=7)
    std, mean = (torch.tensor(values)[:, None, None] for values in (STD, MEAN))
    return [parts.of_epoch(epoch)(path) * std + mean for epoch in EPOCHS]


def test_a_part_has_the_area_and_the_shape_that_are_allowed_and_all_places_occur(slope):
    parts = parts_of(slope, "It rises.")
    assert all(part.shape == (3, 24, 24) for part in parts)
    ends = torch.stack([torch.stack([part[0, 12, [0, -1]].sort().values, part[1, [0, -1], 12]]) for part in parts])
    width, height = (ends[:, :, 1] - ends[:, :, 0]).T  # in shares of the image
    areas, shapes = width * height, width / height
    assert SMALLEST - 0.09 < areas.min() < 0.65 and 0.85 < areas.max() <= 1
    assert 1 / WIDEST - 0.06 < shapes.min() < 0.85 and 1.15 < shapes.max() < WIDEST + 0.06
    assert ends[:, :, 0].min() < 0.05 and ends[:, :, 1].max() > 0.95


def test_half_of_the_parts_are_mirrored_where_no_text_about_the_image_says_left_or_right(slope):
    def mirrored(text: str) -> int:
        return sum(bool(part[0, 12, 0] > part[0, 12, -1]) for part in parts_of(slope, text))

    assert 20 < mirrored("A bright hill, and it is alright.") < 40
    assert mirrored("It rises to the Right.") == mirrored("The leftmost part is dark.") == 0


def test_an_epoch_shows_the_same_parts_again_and_another_epoch_others(slope):
    first, again = parts_of(slope, "It rises."), parts_of(slope, "It rises.")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


def test_a_loader_that_augments_goes_on_from_any_batch_in_any_process(slope):
    processor = ChatProcessor(Tokenizer(write_tokenizer(slope.parent / "tokenizer")), ImageProcessor(16), 4)
    samples = []
    for i in range(12):
        Image.open(slope).rotate(30 * i).save(path := slope.parent / f"{i}.png")
        samples.append(Sample(str(i), (path,), (user("What?", images=1), assistant("A hill."))))

    def pixels(epoch: int, start: int = 0, size: int = 4, **more: int) -> list[torch.Tensor]:
        loader = BatchLoader(samples, processor, size, seed=3, augment=True, **more)
        return [batch.pixels_N3SS for batch in loader.batches(epoch, start)]

    whole = torch.stack(pixels(1))
    assert torch.equal(torch.stack(pixels(1, 1)), whole[1:])
    halves = [torch.stack(pixels(1, size=2, rank=rank, world_size=2, num_workers=0)) for rank in range(2)]
    assert torch.equal(torch.cat(halves, 1), whole)
    sums = [torch.stack(pixels(epoch)).sum((2, 3, 4)).flatten().sort().values for epoch in (1, 2)]
    assert (sums[0] - sums[1]).abs().min() > 1e-3, "no image is shown in the same way again"
    validated = torch.cat([batch.pixels_N3SS for batch in ordered_batches(samples, processor, 4)])
    assert torch.equal(validated, torch.stack([processor.image_processor(*sample.images) for sample in samples]))


def test_features_are_made_once_so_they_cannot_be_of_random_parts():
    config = ExperimentConfig()
    config.data.augment = config.data.cache_features = True
    with pytest.raises(ConfigError, match="features are made once: unset data.cache_features, or augment"):
        config.check()
