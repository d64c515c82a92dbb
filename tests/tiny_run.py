"""A training run that takes a second: random towers, 20 noise images to train on, 6 to validate.

world = write_world(folder)     towers, images and data files
config = world.config(out)      ten steps: five of stage 1, five of stage 2
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmllm.config.schema import ExperimentConfig
from mmllm.storage import checkpoint as disk
from official import write_clip, write_qwen

CAPTIONS = ("a cat", "the thing over there", "in the hat and on the mat", "one")


@dataclass(frozen=True)
class World:
    folder: Path

    def config(self, output_dir: Path, **training) -> ExperimentConfig:
        config = ExperimentConfig(experiment_name="tiny", output_dir=str(output_dir), device="cpu")
        config.model.clip, config.model.qwen = str(self.folder / "clip"), str(self.folder / "qwen")
        config.data.train_data_path = str(self.folder / "train.json")
        config.data.val_data_path = str(self.folder / "val.json")
        config.data.image_dir = str(self.folder / "images")
        config.data.batch_size, config.data.num_workers = 2, 1
        config.training.gradient_accumulation_steps = 2
        config.training.stage1.epochs = config.training.stage2.epochs = 1
        config.training.bf16 = False
        config.training.num_sample_captions = 1
        for name, value in training.items():
            setattr(config.training, name, value)
        return config


def break_image(path: Path) -> None:
    """Its head and its end stay whole: only decoding shows it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def write_world(folder: Path, **qwen) -> World:
    write_clip(folder / "clip", num_hidden_layers=2)
    write_qwen(folder / "qwen", num_hidden_layers=2, **qwen)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    records = []
    for i in range(26):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        records.append({"id": f"s{i}", "image": f"{i}.png", "text": CAPTIONS[i % 4]})
    (folder / "train.json").write_text(json.dumps(records[:20]))
    (folder / "val.json").write_text(json.dumps(records[20:]))
    return World(folder)


def poison(world: World, number: int) -> World:
    """The language model of `world` answers NaN to the digit 7, and training sample `number` asks about it."""
    file = world.folder / "qwen" / "model.safetensors"
    tensors = load_file(file)
    vocabulary = json.loads((world.folder / "qwen" / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["model.embed_tokens.weight"][vocabulary["7"]] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    records = json.loads((world.folder / "train.json").read_text())
    records[number]["prompt"] = "What are 7?"
    (world.folder / "train.json").write_text(json.dumps(records))
    return world


def directory_of(config: ExperimentConfig) -> Path:
    return Path(config.output_dir) / config.experiment_name


def weights(config: ExperimentConfig) -> dict[str, torch.Tensor]:
    """Of its newest checkpoint, with the optimiser's."""
    checkpoint = disk.checkpoints(directory_of(config))[-1]
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "training" / "optimizer.safetensors")
