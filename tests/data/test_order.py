"""The order of samples is a contract, and no image is both trained on and validated."""

from pathlib import Path

import numpy as np
import pytest

from mmllm.data.order import sample_order, split_by_image
from mmllm.data.samples import Sample
from mmllm.errors import ConfigError
from mmllm.reporting.metrics import read_metrics
from mmllm.training.data_plan import plan_data
from mmllm.training.dry_run import architecture
from mmllm.training.experiment import train
from tiny_run import directory_of, write_world


def test_the_order_is_the_same_on_every_machine_and_for_ever():
    assert sample_order(10, seed=1, epoch=2) == [6, 0, 4, 5, 2, 7, 9, 1, 8, 3]


def test_the_order_holds_every_sample_once_and_depends_on_seed_and_epoch():
    orders = [tuple(sample_order(1000, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len(set(orders)) == 9


def test_the_order_mixes_well():
    places = np.array([sample_order(100, 0, epoch) for epoch in range(2000)])
    assert abs(places.mean(0) - 49.5).max() < 2.6  # four standard errors of a uniform place
    assert abs(np.corrcoef(places[:, 0], places[:, 1])[0, 1]) < 0.1


def samples_of(*names: str) -> list[Sample]:
    """A sample for each word, whose letters are its images."""
    return [Sample(str(i), tuple(Path(letter) for letter in name.strip()), ()) for i, name in enumerate(names)]


def images_of(samples: list[Sample]) -> set[Path]:
    return {image for sample in samples for image in sample.images}


def ids_of(samples: list[Sample]) -> list[str]:
    return [sample.id for sample in samples]


@pytest.mark.parametrize("seed", range(20))
def test_no_image_is_on_both_sides_of_a_split(seed):
    samples = samples_of("a", "b", "ab", "c", "cd", "e", "ef", "fg", "h", "a", "i", " ", " ")
    train, val = split_by_image(samples, 0.3, seed)
    assert not images_of(train) & images_of(val)
    assert sorted(ids_of(train + val), key=int) == ids_of(samples)
    assert train and val


def test_a_split_is_a_function_of_its_seed_and_keeps_the_order():
    samples = samples_of(*"abcdefghij" * 2)
    train, val = split_by_image(samples, 0.2, seed=1)
    assert (ids_of(val), len(train)) == (ids_of(split_by_image(samples, 0.2, seed=1)[1]), 16)
    assert ids_of(val) == sorted(ids_of(val), key=int) and len(images_of(val)) == 2
    assert len({tuple(ids_of(split_by_image(samples, 0.2, seed)[1])) for seed in range(10)}) > 5


@pytest.mark.parametrize("fraction, size", [(0.001, 1), (0.5, 5), (0.999, 9)])
def test_a_split_leaves_something_on_both_sides(fraction, size):
    train, val = split_by_image(samples_of(*"abcdefghij"), fraction, 0)
    assert (len(val), len(train)) == (size, 10 - size)


def test_a_run_validates_on_the_images_it_set_aside(tmp_path, capsys):
    world = write_world(tmp_path / "world")
    config = world.config(tmp_path / "out")
    config.data.val_data_path, config.data.val_fraction = None, 0.2
    assert train(config) == 0
    out = capsys.readouterr().out
    assert "data.val_fraction=0.2: 4 samples are set aside, by image, to validate\n16 samples to train on" in out
    assert [row for row in read_metrics(directory_of(config)) if "val_loss" in row]
    assert plan_data(config, architecture(config.model)).samples == 16
    config.data.val_data_path = "val.json"
    with pytest.raises(ConfigError, match="data.val_data_path and data.val_fraction are both set; choose one"):
        config.check()
