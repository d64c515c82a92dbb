"""The small language model of the folds, trained on captions alone, and the files of a training run."""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.crossval.caption_space import CaptionSpace, each_by_the_others, noisy
from examples.crossval.table import Captions
from examples.pretrain.folders import build_tokenizer, write_clip, write_qwen
from examples.pretrain.training import initialise_
from mmllm.config.schema import ExperimentConfig
from mmllm.data.image import ImageProcessor
from mmllm.data.records import CAPTION_PROMPT
from mmllm.errors import DataError
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen import Qwen2
from mmllm.training.experiment import train

TEXTS_PER_IMAGE = 4  # captions in a step of the language model, for each image in one of the folds
TEMPLATE_COPIES = 1000  # of the chat template's words before the tokenizer, which then makes few tokens of them


def write_tower(folder: Path, num_features: int) -> Path:
    """A vision tower that is never run, so that the model has its usual files."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=32,
        patch_size=32,
        projection_dim=num_features,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_clip(folder, CLIPVisionTower(config, with_projection=True), ImageProcessor(32))
    return folder


def write_run(
    folder: Path, captions: Captions, features: dict[str, Tensor], validation: list[str], config: ExperimentConfig
) -> ExperimentConfig:
    """Writes the data of a run into `folder`; returns its configuration, with the run's own directory beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": folder / "train.jsonl", "val": folder / "val.jsonl"}
    parts = {"train": [name for name in captions if name not in set(validation)], "val": validation}
    for part, file in files.items():
        rows = [{"image": name, "captions": list(captions[name])} for name in parts[part]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_file({name: features[name].contiguous() for name in captions}, folder / "features.safetensors")
    num_features = len(next(iter(features.values())))
    config = config.model_copy(deep=True)
    config.experiment_name, config.output_dir = "run", str(folder)
    config.model.clip, config.model.features = str(write_tower(folder / "clip", num_features)), "pooled"
    config.data.train_data_path, config.data.val_data_path = str(files["train"]), str(files["val"])
    config.data.features_path = str(folder / "features.safetensors")
    return config


def trained(config: ExperimentConfig) -> Path:
    """The best model of a finished run; ends the program where a signal stopped it."""
    code = train(config, overwrite=True)
    if code:
        sys.exit(code)
    return Path(config.output_dir) / config.experiment_name / "best_model"


def make_language_model(out: Path, captions: Captions, config: ExperimentConfig, options: argparse.Namespace) -> Path:
    """Trains a small Qwen2 on `captions` alone: each from an embedding of the other captions of its image.

    One epoch over as many copies as `--text-epochs` says, each with other noise.
    """
    features, targets = described(captions, options)
    texts = [text for of_one in captions.values() for text in of_one]
    template = ["system\n", "user\n", "assistant\n", CAPTION_PROMPT, config.model.system_prompt]
    tokenizer = build_tokenizer(texts + template * TEMPLATE_COPIES, options.vocab_size)
    lm = Qwen2(
        Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 32,
            num_key_value_heads=options.width // 64,
            head_dim=32,
            rope_theta=1e4,
            max_position_embeddings=1024,
        )
    )
    initialise_(lm, config.seed)
    write_qwen(out / "qwen", lm, tokenizer)
    validation = sorted(targets)[:: max(10, len(targets) // 200)]
    config = write_run(out, targets, features, validation, config)
    config.model.qwen = str(out / "qwen")
    config.data.batch_size *= TEXTS_PER_IMAGE
    config.training.stage1.epochs = config.training.stage3.epochs = 0
    config.training.stage2.epochs, config.training.stage2.learning_rate = 1, options.text_rate
    write_qwen(out / "qwen", MultimodalLLM.from_pretrained(trained(config)).language_model, tokenizer)
    return out / "qwen"


def described(captions: Captions, options: argparse.Namespace) -> tuple[dict[str, Tensor], Captions]:
    """Embeddings in place of images, and the caption that is the target of each, by the same names."""
    space = CaptionSpace(list(captions.values()), options.caption_features)
    features, targets = {}, {}
    for name, texts in captions.items():
        for number, (others, text) in enumerate(each_by_the_others(texts)):
            embedding_F = space(others)
            for copy in range(options.text_epochs):
                features[f"{name}#{number}.{copy}"] = noisy(embedding_F, len(targets))
                targets[f"{name}#{number}.{copy}"] = (text,)
    if not targets:
        raise DataError(f"{options.captions}: no image has two captions, of which one could stand for it")
    return features, targets
