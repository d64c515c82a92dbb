"""SigLIP and Qwen3 through a whole run: trained, saved, and answered with."""

import pytest
import torch
from PIL import Image

from mmllm.config.schema import StageConfig
from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen3 import Qwen3
from mmllm.models.siglip import SigLIPVisionTower
from mmllm.reporting.metrics import read_metrics
from mmllm.training.dry_run import architecture
from mmllm.training.experiment import train
from official import write_clip, write_qwen3, write_siglip
from tiny_run import directory_of, write_world

SHORT = GenerationConfig(max_new_tokens=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = write_world(tmp_path_factory.mktemp("world"))
    write_siglip(world.folder / "clip", num_hidden_layers=2)
    write_qwen3(world.folder / "qwen", num_hidden_layers=2)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapters on int8"])
def test_a_run_with_siglip_and_qwen3_learns_and_its_model_answers(world, tmp_path, kind):
    config = world.config(tmp_path)
    if kind == "whole":
        config.training.stage2.train = ("projector", "language_model", "vision_tower")
        config.training.gradient_checkpointing = True
    else:
        config.model.use_lora = config.model.load_in_8bit = True
    assert architecture(config.model).vision.model_type == "siglip_vision_model"
    assert train(config) == 0
    first, *_, last = [row["val_loss"] for row in read_metrics(directory_of(config)) if "val_loss" in row]
    assert last < first - 0.01
    for dtype in ("float32", "int8"):
        pipeline = load_pipeline(directory_of(config) / "best_model", device="cpu", dtype=dtype)
        assert isinstance(pipeline.model.vision_tower, SigLIPVisionTower)
        assert isinstance(pipeline.model.language_model, Qwen3)
        assert isinstance(pipeline.caption_image(Image.new("RGB", (40, 30), "red"), config=SHORT), str)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, image_size, tokens",
    [
        ({"patch_size": 16}, None, 4),
        ({"patch_size": 14, "image_size": 28, "hidden_size": 192, "num_hidden_layers": 4}, None, 4),
        ({"patch_size": 14, "image_size": 42, "hidden_size": 192, "num_hidden_layers": 4}, None, 9),
        ({"patch_size": 16}, 48, 9),
    ],
    ids=["B/16", "L/14", "L/14 at 336", "B/16 at another size"],
)
def test_clips_of_other_patches_are_trained_with_all_else(world, tmp_path, sizes, image_size, tokens):
    config = world.config(tmp_path, stage1=StageConfig(epochs=0))
    config.model.clip, config.model.image_size = str(write_clip(tmp_path / "clip", **sizes)), image_size
    config.model.image_fit = "pad"
    config.training.stage2.train = ("projector", "language_model", "vision_tower")
    assert architecture(config.model).num_image_tokens == tokens
    assert train(config) == 0
    model = load_pipeline(directory_of(config) / "best_model", device="cpu", dtype="float32").model
    untrained = MultimodalLLM.from_towers(config.model.clip, config.model.qwen, image_size=image_size)
    assert model.processor.image_processor.fit == "pad" and untrained.processor.image_processor.fit == "crop"
    assert model.config == untrained.config and model.config.num_image_tokens == tokens
    after, before = model.vision_tower.state_dict(), untrained.vision_tower.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in before if "position_embedding" in name)
