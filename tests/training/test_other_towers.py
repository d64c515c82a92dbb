"""SigLIP and Qwen3 through a whole run: trained, saved, and answered with."""

import pytest
from PIL import Image

from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig
from mmllm.models.qwen3 import Qwen3
from mmllm.models.siglip import SigLIPVisionTower
from mmllm.reporting.metrics import read_metrics
from mmllm.training.dry_run import architecture
from mmllm.training.experiment import train
from official import write_qwen3, write_siglip
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
