"""What a run will take, before it takes it: parameters, steps, memory. `train.py --dry-run`.

The surprising fact: nothing is loaded for it. The model is built from configurations alone, and its step is taken with
tensors that have no contents, so this answers on a laptop that could never train it.
Next: simulate.py.
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
    """The sizes of the model that `settings` ask for, from local folders or from what is known of published ones."""
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


# What a process takes beside its tensors: Python, torch, what they load at the first step, scratch of the kernels. And of
# a step, the gaps between what is kept of it (device.py).
PROCESS_BYTES = {"cpu": 540_000_000, "cuda": 70_000_000, "mps": 0}
GAPS = {"cpu": 1.1, "cuda": 1.0, "mps": 1.0}


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage: held weights, moments of the optimiser, what a step adds, the process itself."""

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
    """Predicted peak of one process that trains `stage`, on rows of `data.max_length` tokens with a picture each.

    `targets`: learnt tokens of a micro-batch; None: all that are no picture.
    """
    held = {}

    def build() -> MultimodalLLM:
        model = MultimodalLLM(shape)
        prepare(model, uncompiled(config))
        train_only_(model, trained_parts(stage))
        held["whole"] = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
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
    # for validation and checkpoints, when a step's tensors are gone, all weights are float32 again
    step = max(GAPS[kind] * step, held["whole"] - held["weights"])
    return Memory(held["weights"], 2 * held["trained"], step, PROCESS_BYTES[kind])


def uncompiled(config: ExperimentConfig) -> ExperimentConfig:
    """The same without `training.compile`: compiled code takes no more memory, and needs contents to run."""
    return config.model_copy(update={"training": config.training.model_copy(update={"compile": False})})


def halved_weights(model: MultimodalLLM) -> list[nn.Parameter]:
    """What the trainer holds in bfloat16 while it is frozen, when the language model's file is in bfloat16, as Qwen's."""
    layers = [layer for layer in model.language_model.modules() if isinstance(layer, nn.Linear | nn.Embedding)]
    return list({id(p): p for layer in layers if not (p := layer.weight).requires_grad}.values())


def describe(config: ExperimentConfig) -> list[str]:
    """The lines of `--dry-run`."""
    shape = architecture(config.model)
    with torch.device("meta"):
        model = MultimodalLLM(shape)
    prepare(model, uncompiled(config))
    stages = config.stages()
    trainable = []
    for stage in stages:
        train_only_(model, trained_parts(stage))
        trainable.append({name: count_parameters(part, True) for name, part in model.named_children()})
    lines = [f"{'':22}{'parameters':>14}{'stage 1 trains':>16}{'stage 2 trains':>16}"]
    for name, part in model.named_children():
        lines.append(_row(name, count_weights(part), *(counts[name] for counts in trainable)))
    lines.append(_row("total", count_weights(model), *(sum(counts.values()) for counts in trainable)))
    samples, note = count_samples(config)
    for number, stage in enumerate(stages, 1):
        per_step = stage.batch_size * stage.gradient_accumulation_steps
        steps = f"{stage.epochs} epochs, {stage.epochs * (samples // per_step)} steps" if samples else note
        memory = stage_memory(shape, config, stage)
        lines.append(
            f"stage {number}: {steps} of {per_step} samples ({stage.batch_size} x {stage.gradient_accumulation_steps}); "
            f"about {memory.total / 1e9:.1f} GB at most, for samples of {config.data.max_length} tokens ({memory})"
        )
    return lines


def _row(name: str, *numbers: int) -> str:
    return f"{name:22}" + "".join(f"{number:>{width},}" for number, width in zip(numbers, (14, 16, 16), strict=True))


def count_samples(config: ExperimentConfig) -> tuple[int, str]:
    """How many training samples there are; 0 and a note when the data is not there."""
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
    return len(samples), ""
