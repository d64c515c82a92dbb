"""What a run will take, before it takes it: parameters, memory, steps, floating-point operations.

The surprising fact: nothing is loaded for it. The model is built on the meta device, from configurations alone, so
`train.py configs/full.py --dry-run` answers on a laptop that could never train it.
Next: trainer.py.
"""

from pathlib import Path

import torch
from torch import nn

from mmllm.clip import CLIPVisionConfig
from mmllm.config import ExperimentConfig, ModelConfig, StageConfig
from mmllm.data import read_samples, share_images
from mmllm.errors import ConfigError, DataError
from mmllm.lora import add_lora_
from mmllm.model import MultimodalConfig, MultimodalLLM, read_config
from mmllm.quant import quantize_
from mmllm.qwen import Qwen2Config
from mmllm.surgery import count_parameters, count_weights, train_only_
from mmllm.weights import read_json

PART_OF = {  # the words of the configuration: the model's own names
    "projector": "multi_modal_projector",
    "language_model": "language_model",
    "vision_tower": "vision_tower",
}
PUBLISHED_CLIP = {"openai/clip-vit-base-patch32": CLIPVisionConfig()}
PUBLISHED_QWEN = {"Qwen/Qwen2.5-0.5B": Qwen2Config(), "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config()}
PEAK_FLOPS = {  # dense bfloat16, from NVIDIA's data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Bytes that the backward pass of one decoder block keeps for a token: a x intermediate_size + b x hidden_size.
# Measured with saved_tensors_hooks; by (block is trained, bfloat16).
SAVED_BYTES = {(False, True): (6, 17), (True, True): (8, 39), (False, False): (12, 22), (True, False): (16, 42)}


def architecture(settings: ModelConfig) -> MultimodalConfig:
    """The sizes of the model that `settings` ask for, from local folders or from what is known of published ones."""
    if settings.pretrained:
        _refuse_missing("model.pretrained", settings.pretrained)
        return read_config(settings.pretrained)[0]
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


def describe(config: ExperimentConfig) -> list[str]:
    """The lines of `--dry-run`."""
    with torch.device("meta"):
        model = MultimodalLLM(architecture(config.model))
    if config.model.load_in_8bit:
        quantize_(model.language_model)
    if config.model.use_lora:
        add_lora_(model.language_model, config.model.lora_config)
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
        train_only_(model, trained_parts(stage))
        per_step = stage.batch_size * stage.gradient_accumulation_steps
        steps = f"{stage.epochs} epochs, {stage.epochs * (samples // per_step)} steps" if samples else note
        memory = peak_bytes(model, config, stage) / 1e9
        lines.append(
            f"stage {number}: {steps} of {per_step} samples ({stage.batch_size} x {stage.gradient_accumulation_steps}); "
            f"about {memory:.1f} GB at most, for samples of {config.data.max_length} tokens"
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
    return len(share_images(samples) if config.data.share_images else samples), ""


def trained_parts(stage: StageConfig) -> list[str]:
    """The model's names of the parts that a stage trains."""
    return [PART_OF[part] for part in stage.train]


def peak_bytes(model: MultimodalLLM, config: ExperimentConfig, stage: StageConfig) -> float:
    """Predicted peak memory of a stage: weights, gradients and moments in float32, and what the backward pass keeps."""
    text, bf16 = model.config.text, config.training.bf16
    tokens = stage.batch_size * config.data.max_length
    per_size, per_width = SAVED_BYTES["language_model" in stage.train, bf16]
    block = tokens * (per_size * text.intermediate_size + per_width * text.hidden_size)
    if config.training.gradient_checkpointing:
        activations = block + text.num_hidden_layers * tokens * 4 * text.hidden_size
    else:
        activations = text.num_hidden_layers * block
    copies = 2 * count_parameters(model.language_model) if bf16 else 0
    logits = 4 * 4 * min(tokens * text.vocab_size, 2**26)  # one piece, its gradient and what both are made of
    held = 4 * count_parameters(model) + sum(b.numel() * b.element_size() for b in model.buffers())
    return held + 12 * count_parameters(model, True) + copies + activations + logits


def step_flops(model: MultimodalLLM, tokens: int, targets: int, images: int) -> float:
    """Floating-point operations of the matrix products with weights in a forward and backward pass (attention left out).

    Two a weight and token forward, two for the gradient of the input, two for that of a trained weight.
    """
    text, vision, layers = model.config.text, model.config.vision, model.language_model.model.layers
    head = text.vocab_size * text.hidden_size * targets
    language = 4 * (count_weights(layers) * tokens + head)
    language += 2 * count_parameters(layers, only_trainable=True) * tokens
    if model.language_model.lm_head.weight.requires_grad:
        language += 2 * head
    tower = count_parameters(model.vision_tower) * (vision.num_patches + 1) * images
    return language + tower * (6 if is_trained(model.vision_tower) else 2)


def is_trained(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())


def peak_flops(device: torch.device) -> float | None:
    """What the device could do in a second, where it is known."""
    if device.type != "cuda":
        return None
    full = torch.cuda.get_device_name(device)
    return next((flops for name, flops in PEAK_FLOPS.items() if name in full), None)
