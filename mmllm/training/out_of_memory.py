"""What a step costs and what a device can do: operations, peak rates; and what to change where memory does not suffice.

The surprising fact: most of the operations of a step are known without looking at it. Every weight costs two of them for
each token that passes it, two more where its input has a gradient, and two more where it is trained itself.
Next: dryrun.py, trainer.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mmllm.config.schema import ExperimentConfig, StageConfig
from mmllm.errors import RunError
from mmllm.layers.quantized import count_parameters, count_weights
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.memory import peak_memory

PART_OF = {  # the words of the configuration: the model's own names
    "projector": "multi_modal_projector",
    "language_model": "language_model",
    "vision_tower": "vision_tower",
}
PEAK_FLOPS = {  # dense bfloat16, from NVIDIA's data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def trained_parts(stage: StageConfig) -> list[str]:
    """The model's names of the parts that a stage trains."""
    return [PART_OF[part] for part in stage.train]


def step_flops(model: MultimodalLLM, tokens: int, targets: int, images: int) -> float:
    """Floating-point operations of the matrix products with weights in a forward and backward pass (attention left out).
    The last MLP and the head are those of the targets alone.

    Two a weight and token forward, two for the gradient of the input, two for that of a trained weight.
    """
    text, vision, layers = model.config.text, model.config.vision, model.language_model.model.layers
    head = text.vocab_size * text.hidden_size * targets
    last, others = layers[-1].mlp, tokens - targets
    language = 4 * (count_weights(layers) * tokens - count_weights(last) * others + head)
    language += 2 * (count_parameters(layers, True) * tokens - count_parameters(last, True) * others)
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


# Where memory does not suffice ----------------------------------------------------------------------------------------


@contextmanager
def named_out_of_memory(
    config: ExperimentConfig, number: int, device: torch.device, place: Callable[[], str] = lambda: "at its start"
) -> Iterator[None]:
    """RunError with the settings to try where memory ran out in stage `number`, `place` says where; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of which torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        stage = config.stages()[number - 1]
        where = ", ".join([place(), *getattr(error, "__notes__", ())])
        raise RunError(
            f"out of memory at {peak_memory(device) / 1e9:.1f} GB in stage {number}, {where}, with batches of "
            f"{stage.batch_size} samples; try {smaller(config, number)}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's allocator for the CPU has no error of its own, only words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def smaller(config: ExperimentConfig, number: int) -> str:
    """The settings to try next where stage `number` did not fit: the gradient stays the same as long as that can be."""
    stage, own = config.stages()[number - 1], f"training.stage{number}"
    is_general = config.get(f"{own}.batch_size") is None and config.get(f"{own}.gradient_accumulation_steps") is None
    names = ("data.batch_size", "training.gradient_accumulation_steps")
    if not is_general:
        names = (f"{own}.batch_size", f"{own}.gradient_accumulation_steps")
    tries = []
    if stage.batch_size > 1:
        size = stage.batch_size // 2
        accumulation = -(-stage.batch_size * stage.gradient_accumulation_steps // size)
        tries.append(f"{names[0]}={size} {names[1]}={accumulation} (the gradient is the same)")
    if not config.training.gradient_checkpointing:
        tries.append("training.gradient_checkpointing=true (slower, the gradient is the same)")
    if not tries:
        tries.append(f"data.max_length={max(1, config.data.max_length // 2)}")
    if not config.model.use_lora and "language_model" in stage.train:
        tries.append("model.use_lora=true")
    return ", or ".join(tries)
