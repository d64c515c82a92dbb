"""Parameters, steps and peak memory of a run before it begins: `train.py --dry-run`.

Nothing is loaded. The model is built from its configuration, and its step runs on tensors without contents
(step_memory.py), so a laptop answers for a model that it could never train.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mmllm.config.schema import ExperimentConfig, ModelConfig, StageConfig
from mmllm.data.order import split_by_image
from mmllm.data.samples import read_samples, share_images
from mmllm.errors import ConfigError, DataError
from mmllm.layers.quantized import count_parameters, count_weights
from mmllm.models.config import CLIPVisionConfig, MultimodalConfig, Qwen2Config
from mmllm.models.loading import read_info
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.device import choose_device
from mmllm.runtime.files import read_json
from mmllm.training.prepare import cast_, prepare, train_only_, trained_parts
from mmllm.training.step_memory import step_peak

PUBLISHED_CLIP = {"openai/clip-vit-base-patch32": CLIPVisionConfig()}
PUBLISHED_QWEN = {"Qwen/Qwen2.5-0.5B": Qwen2Config(), "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config()}


def architecture(settings: ModelConfig) -> MultimodalConfig:
    """The sizes of the model that `settings` ask for, from local folders or the published models known here."""
    if settings.pretrained:
        _refuse_missing("model.pretrained", settings.pretrained)
        return read_info(settings.pretrained).config
    vision = _sizes("model.clip", settings.clip, CLIPVisionConfig, PUBLISHED_CLIP)
    text = _sizes("model.qwen", settings.qwen, Qwen2Config, PUBLISHED_QWEN)
    return MultimodalConfig(vision, text, settings.features)


def _sizes(name: str, source: str, kind: type, published: dict) -> CLIPVisionConfig | Qwen2Config:
    if source in published and not Path(source).is_dir():
        return published[source]
    _refuse_missing(name, source)
    return kind.from_dict(read_json(Path(source).expanduser() / "config.json"))


def _refuse_missing(name: str, source: str) -> None:
    if not Path(source).expanduser().is_dir():
        raise ConfigError(f"{name} is {source!r}: no such folder here, and a dry run downloads nothing")


# Memory of a process beside its tensors: Python, torch, what they load at the first step, scratch space of the kernels.
PROCESS_BYTES = {"cpu": 540_000_000, "cuda": 70_000_000, "mps": 0}
GAPS = {"cpu": 1.1, "cuda": 1.0, "mps": 1.0}  # of a step: what the allocator wastes, see runtime/memory.py


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage: weights as they are held, optimizer moments, what a step adds, the process itself."""

    weights: float
    moments: float
    step: float
    process: float

    @property
    def total(self) -> float:
        return self.weights + self.moments + self.step + self.process

    def __str__(self) -> str:
        parts = {"weights": self.weights, "moments": self.moments, "the step": self.step, "the process": self.process}
        return " + ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)


def stage_memory(
    shape: MultimodalConfig,
    config: ExperimentConfig,
    stage: StageConfig,
    *,
    targets: int | None = None,
    device: torch.device | None = None,
) -> Memory:
    """Predicted peak of one process that trains `stage`, on rows of `data.max_length` tokens with an image each.

    `targets`: tokens to predict in a micro-batch; None: all that are not image tokens.
    """
    held = {}

    def build() -> MultimodalLLM:
        model = MultimodalLLM(shape)
        prepare(model, uncompiled(config))
        train_only_(model, trained_parts(stage))
        held["float32"] = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        if config.training.bf16:
            cast_(halved_weights(model), torch.bfloat16)
        held["weights"] = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        held["trained"] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        return model

    length = config.data.max_length
    step = step_peak(
        build,
        rows=stage.batch_size,
        length=length,
        targets=targets or stage.batch_size * max(1, length - shape.num_image_tokens),
        images=stage.batch_size,
        bf16=config.training.bf16,
        micro_batches=min(2, stage.gradient_accumulation_steps),
    )
    kind = (device or choose_device(config.device)).type
    # for validation and checkpoints, after a step has freed its tensors, all weights are float32 again
    step = max(GAPS[kind] * step, held["float32"] - held["weights"])
    return Memory(held["weights"], 2 * held["trained"], step, PROCESS_BYTES[kind])


def uncompiled(config: ExperimentConfig) -> ExperimentConfig:
    """The same without `training.compile`: compiled code takes no more memory, and needs contents to run."""
    return config.model_copy(update={"training": config.training.model_copy(update={"compile": False})})


def halved_weights(model: MultimodalLLM) -> list[nn.Parameter]:
    """The frozen weights that a run holds in bfloat16 where the language model's file is bfloat16, as Qwen2.5's is."""
    layers = [layer for layer in model.language_model.modules() if isinstance(layer, nn.Linear | nn.Embedding)]
    return list({id(p): p for layer in layers if not (p := layer.weight).requires_grad}.values())


def describe(config: ExperimentConfig) -> list[str]:
    """The lines of `--dry-run`."""
    shape = architecture(config.model)
    with torch.device("meta"):
        model = MultimodalLLM(shape)
    prepare(model, uncompiled(config))
    stages = config.stages()
    columns = [[count_weights(part) for part in model.children()]]
    for stage in stages:
        train_only_(model, trained_parts(stage))
        columns.append([count_parameters(part, only_trainable=True) for part in model.children()])
    names = [*(name for name, _ in model.named_children()), "total"]
    rows = zip(names, *([*column, sum(column)] for column in columns), strict=True)
    lines = [f"{'':22}{'parameters':>14}{'stage 1 trains':>16}{'stage 2 trains':>16}"]
    lines += [f"{name:22}{weights:>14,}{first:>16,}{second:>16,}" for name, weights, first, second in rows]
    samples, note = count_samples(config)
    for number, stage in enumerate(stages, 1):
        per_step = stage.batch_size * stage.gradient_accumulation_steps
        steps = f"{stage.epochs} epochs, {stage.epochs * (samples // per_step)} steps{note}" if samples else note
        memory = stage_memory(shape, config, stage)
        lines.append(
            f"stage {number}: {steps} of {per_step} samples ({stage.batch_size} x {stage.gradient_accumulation_steps}); "
            f"about {memory.total / 1e9:.1f} GB at most, for samples of {config.data.max_length} tokens ({memory})"
        )
    return lines


def count_samples(config: ExperimentConfig) -> tuple[int, str]:
    """The number of training samples, and a note where they hold several texts; 0 and a note where they cannot be read."""
    path = config.data.train_data_path
    if path is None:
        return 0, "steps unknown (data.train_data_path is not set)"
    try:
        samples = read_samples(path, config.data.image_dir, config.data.train_split)
    except DataError as error:
        return 0, f"steps unknown ({error})"
    samples = samples[: config.data.max_train_samples]
    samples = share_images(samples) if config.data.share_images else samples
    if config.data.val_fraction:
        samples, _ = split_by_image(samples, config.data.val_fraction, config.seed)
    texts = max((1 + len(sample.shared) for sample in samples), default=1)
    several = f"up to {texts} texts of an image, in several rows where they do not fit data.max_length together"
    return len(samples), f" (a sample is {several})" if texts > 1 else ""
