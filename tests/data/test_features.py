"""Features in place of pixels: the same numbers, and neither the tower nor an image is needed any more."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from mmllm.config.schema import ExperimentConfig
from mmllm.data.batches import make_batch, read_rows
from mmllm.data.features import FeatureTable, write_features
from mmllm.data.samples import load_samples
from mmllm.errors import ConfigError, DataError, ImageError, RunError
from mmllm.models.multimodal import MultimodalLLM
from mmllm.reporting.metrics import read_metrics
from mmllm.runtime.device import autocast
from mmllm.training.experiment import feature_cache, train
from tiny_run import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=["patch", "pooled"])
def model(world, request):
    model = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen", features=request.param)
    model.vision_tower.requires_grad_(False)
    return model


def images_of(world) -> list[Path]:
    return sorted((world.folder / "images").iterdir())


def losses(config: ExperimentConfig) -> list[float]:
    rows = read_metrics(Path(config.output_dir) / config.experiment_name)
    return [row.get("loss", row.get("val_loss")) for row in rows]


@pytest.mark.parametrize("bf16", [False, True])
def test_kept_features_give_the_loss_of_their_images_bit_for_bit(world, model, tmp_path, bf16):
    samples = load_samples(world.folder / "train.json", world.folder / "images")[:6]
    cache = feature_cache(model, tmp_path, bf16)
    assert cache.fill(sample.images[0] for sample in samples) == 6

    def batch(read_image):
        return make_batch(
            [row for s in samples for row in read_rows(s, model.processor, None, read_image)], model.processor
        )

    with autocast(model.device, bf16):
        plain, _ = model(*vars(batch(None)).values())
        model.vision_tower.vision_model.pre_layrnorm.weight.data.fill_(torch.nan)  # must not be used
        kept, _ = model(*vars(batch(cache)).values())
    assert torch.equal(kept, plain)
    assert plain.isfinite()


def test_features_are_made_once_for_a_tower_and_the_content_of_an_image(world, model, tmp_path):
    images = [Path(shutil.copy(path, tmp_path / path.name)) for path in images_of(world)[:5]]
    first = feature_cache(model, tmp_path / "kept", bf16=False)
    assert first.fill(images) == 5
    again = feature_cache(model, tmp_path / "kept", bf16=False)
    assert again.fill([*images, *images]) == 0
    cut = again.files[images[0]]
    cut.write_bytes(cut.read_bytes()[:-1])
    shutil.copy(images[2], images[1])  # other content, known already
    assert feature_cache(model, tmp_path / "kept", bf16=False).fill(images) == 1
    assert feature_cache(model, tmp_path / "kept", bf16=True).fill(images) == 4
    model.vision_tower.vision_model.pre_layrnorm.weight.data += 1
    assert feature_cache(model, tmp_path / "kept", bf16=False).fill(images[:1]) == 1
    for path in images:
        path.unlink()  # images are not decoded again
    assert_close(again(images[0]), first(images[0]))
    assert again(images[0]).shape == model.config.feature_shape


def test_many_may_fill_one_folder_at_the_same_time(world, model, tmp_path):
    caches = [feature_cache(model, tmp_path, bf16=False) for _ in range(3)]
    threads = [threading.Thread(target=cache.fill, args=(images_of(world),)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.rglob("*.*"))) == 26
    shares = [feature_cache(model, tmp_path / "shared", bf16=False) for _ in range(2)]
    assert [cache.fill(images_of(world), rank=rank, world_size=2) for rank, cache in enumerate(shares)] == [13, 13]
    assert torch.equal(shares[0](images_of(world)[1]), shares[1](images_of(world)[1]))


def test_an_image_that_cannot_be_read_is_an_error_of_that_image(world, model, tmp_path):
    (tmp_path / "cut.png").write_bytes(images_of(world)[0].read_bytes()[:-40])
    cache = feature_cache(model, tmp_path / "kept", bf16=False)
    cache.fill([tmp_path / "cut.png", tmp_path / "gone.png", *images_of(world)[:1]])
    with pytest.raises(ImageError, match="cut.png: broken or cut off"):
        cache(tmp_path / "cut.png")
    with pytest.raises(ImageError, match="no such image: .*gone.png"):
        cache(tmp_path / "gone.png")
    assert cache(images_of(world)[0]).isfinite().all()


@pytest.mark.slow
def test_a_run_with_kept_or_given_features_is_the_run_with_images(world, tmp_path):
    plain = world.config(tmp_path / "plain")
    assert train(plain) == 0
    kept = world.config(tmp_path / "kept")
    kept.data.cache_features = True
    assert train(kept) == 0
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-5)
    model = MultimodalLLM.from_towers(world.folder / "clip", world.folder / "qwen")
    pixels = torch.stack([model.processor.image_processor(path) for path in images_of(world)])
    with torch.no_grad():
        features = model.vision_features(pixels)
    names = [path.name for path in images_of(world)]
    save_file({n: f.clone() for n, f in zip(names, features, strict=True)}, tmp_path / "table.safetensors")
    given = world.config(tmp_path / "given")
    given.data.image_dir = str(tmp_path / "nowhere")
    given.data.features_path = str(tmp_path / "table.safetensors")
    assert train(given) == 0
    assert losses(given) == pytest.approx(losses(plain), abs=1e-5)


def test_a_disk_that_fills_up_is_one_line_and_leaves_no_half_file(tmp_path):
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, old[1]))
    try:
        with pytest.raises(RunError, match=r"x.safetensors: cannot be written .*free some space, or set data.cache"):
            write_features(tmp_path / "x.safetensors", torch.ones(4, 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_what_a_table_has_not_is_named(tmp_path):
    tensors = {"a.jpg": torch.ones(4), "sub/b.jpg": torch.ones(1, 4), "c.jpg": torch.ones(5)}
    save_file(tensors, tmp_path / "t.safetensors")
    table = FeatureTable(tmp_path / "t.safetensors", [tmp_path, tmp_path / "val"], (1, 4))
    assert table(tmp_path / "a.jpg").shape == table(tmp_path / "val" / "a.jpg").shape == (1, 4)
    assert table.fault(tmp_path / "sub" / "b.jpg") == ""
    assert table.fault(tmp_path / "d.jpg").endswith(
        "has no features of d.jpg; its tensors are named as the images in the data file"
    )
    with pytest.raises(ImageError, match=r"c.jpg is \[5\], but the model takes \[1, 4\]"):
        table(tmp_path / "c.jpg")
    with pytest.raises(DataError, match=r"none.safetensors: cannot be read .* it is data.features_path"):
        FeatureTable(tmp_path / "none.safetensors", [tmp_path], (1, 4))


def test_features_are_refused_where_the_tower_is_trained():
    config = ExperimentConfig()
    config.data.cache_features = True
    config.check()
    config.training.stage2.train = ("projector", "vision_tower")
    with pytest.raises(ConfigError, match="training.stage2.train has vision_tower, but data.cache_features"):
        config.check()
    config.data.features_path = "x"
    with pytest.raises(ConfigError, match="both set; choose one"):
        config.check()
