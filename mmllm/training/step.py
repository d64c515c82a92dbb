"""One optimizer step: gradient accumulation, the update, the learning rate, and the operations that it costs.

Accumulation is not an average of averages. Micro-batches hold different numbers of targets, so a step first counts the
targets of all of its micro-batches, in all processes, and divides every summed loss by that one number. Any split of the
same samples then gives the same gradient; a mean of means is off by as much as a third.

There is no scheduler object: the learning rate is a function of the step number, so a resumed run restores one integer.
AdamW: https://arxiv.org/abs/1711.05101; cosine decay with warm-up as in LLaVA 1.5: https://arxiv.org/abs/2310.03744.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from mmllm.config.schema import TrainingConfig
from mmllm.data.batches import Batch
from mmllm.data.chat import IGNORED
from mmllm.layers.quantized import count_parameters, count_weights
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.device import autocast
from mmllm.runtime.distributed import World, full
from mmllm.training.adamw8bit import AdamW8bit
from mmllm.training.fsdp import is_sharded, reduce_after_

GROWTH_INTERVAL = 2000  # steps without overflow after which the scale doubles; GradScaler's default
PEAK_FLOPS = {  # dense bfloat16, from NVIDIA's data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass
class LossScale:
    """The factor of the loss that keeps gradients within float16, whose smallest number is 6e-8.

    The rule of torch.amp.GradScaler, which shows no sharded gradient to other processes: here the norm of the gradient,
    which all processes share, says whether one overflowed. A power of two changes no other bit.
    """

    value: float = 2.0**16
    good_steps: int = 0  # since the last change

    def update(self, overflows: bool) -> None:
        self.good_steps = 0 if overflows else self.good_steps + 1
        if overflows:
            self.value /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = 2 * self.value, 0


def update_(
    model: MultimodalLLM,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    settings: TrainingConfig,
    targets: float,
    world: World,
    scale: LossScale | None = None,
) -> tuple[float, float]:
    """Take one step; return its loss and its gradient norm before clipping.

    `batches` are the micro-batches of this process, `targets` those of all processes together. When the loss or the norm
    is not finite, no weight and no moment changes. An overflow (only the norm is not finite) halves `scale`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss = accumulate_gradients(model, batches, settings.bf16, targets, scale.value if scale else 1.0)
    world.sum_([loss])
    if not is_sharded(model):  # the backward pass of a sharded model sums the gradients itself
        world.sum_gradients_(parameters)
    for p in parameters if scale else []:
        if p.grad is not None:
            p.grad.div_(scale.value)
    norm = full(clip_grad_norm_(parameters, settings.max_grad_norm))
    loss, norm = torch.stack((loss, norm.to(loss.dtype))).tolist()  # the only wait for the device in a step
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    if scale and math.isfinite(loss):
        scale.update(not math.isfinite(norm))
    optimizer.zero_grad()
    return loss, norm


def accumulate_gradients(
    model: MultimodalLLM, batches: list[Batch], bf16: bool = False, targets: float | None = None, scale: float = 1.0
) -> Tensor:
    """Add the gradient of `scale` * (summed loss / `targets`) to `.grad`; return that quotient, a scalar on the device.

    `targets` None: the targets of `batches`, which then are the whole step.
    """
    targets = max(1, count_targets(batches) if targets is None else targets)
    total = torch.zeros((), device=model.device)
    for number, batch in enumerate(batches, 1):
        reduce_after_(model, is_last=number == len(batches))
        try:
            batch = batch.to(model.device)
            with autocast(model.device, bf16):
                loss_sum, _ = model(*vars(batch).values())
            loss = loss_sum / targets
            (loss * scale).backward()
        except (MemoryError, RuntimeError) as error:
            error.add_note(f"micro-batch {number} of {len(batches)}")
            raise
        total += loss.detach()
    return total


def count_targets(batches: Iterable[Batch]) -> int:
    """Tokens to predict in all of the batches, which are still on the CPU, so nothing waits for the device."""
    return sum(int((batch.labels_BT[:, 1:] != IGNORED).sum()) for batch in batches)


def step_counts(batches: list[Batch]) -> tuple[int, int, int]:
    """Targets, tokens and images in the micro-batches of a step."""
    tokens = sum(batch.ids_BT.numel() for batch in batches)
    return count_targets(batches), tokens, sum(len(batch.pixels_N3SS) for batch in batches)


# Optimizer and learning rate


def adamw(groups: list[dict], beta1: float, beta2: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """AdamW, fused: 3.6 ms a step where the plain loop takes 13.3 (8 M parameters, two cores). Or its 8-bit `kind`."""
    if kind == "adamw8bit":
        return AdamW8bit(groups, betas=(beta1, beta2), eps=1e-8)
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=1e-8, fused=True)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], peaks: Mapping[str, float], weight_decay: float
) -> list[dict]:
    """Groups for AdamW of all trainable parameters, with the peak learning rate of each group under "peak".

    `peaks` maps prefixes of names to peak rates; ValueError for a trainable parameter that no prefix matches.
    Only matrices decay: biases and the gains of norms have no reason to be small.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        peak = next((rate for prefix, rate in peaks.items() if name.startswith(prefix)), None)
        if peak is None:
            raise ValueError(f"no learning rate for {name}; rates are given for {', '.join(peaks)}")
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [{"params": p, "peak": peak, "weight_decay": decay} for (peak, decay), p in groups.items()]


def learning_rate_at(step: int, peak: float, warmup: int, total: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then cosine to 0 at `total`.

    Step 0 already moves (peak/warmup); step `total` raises ValueError: a loop that gets there has a bug.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is outside a schedule of {total} steps")
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_learning_rates_(optimizer: torch.optim.Optimizer, step: int, warmup: int, total: int) -> float:
    """Set the rate of every group for this step; return the highest one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, group["peak"], warmup, total)
    return max(group["lr"] for group in optimizer.param_groups)


# Cost


def step_flops(model: MultimodalLLM, tokens: int, targets: int, images: int) -> float:
    """Floating-point operations of the products with weights in a forward and backward pass; attention is left out.

    Two for each weight and token forward, two for the gradient of its input, two for the gradient of a trained weight.
    The last MLP and the head run on the targets alone.
    """
    text, vision, layers = model.config.text, model.config.vision, model.language_model.model.layers
    head = text.vocab_size * text.hidden_size * targets
    last, others = layers[-1].mlp, tokens - targets
    language = 4 * (count_weights(layers) * tokens - count_weights(last) * others + head)
    language += 2 * (count_parameters(layers, True) * tokens - count_parameters(last, True) * others)
    if model.language_model.lm_head.weight.requires_grad:
        language += 2 * head
    tower = count_parameters(model.vision_tower) * (vision.num_patches + 1) * images
    return language + tower * (6 if count_parameters(model.vision_tower, True) else 2)


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that the device can do at most; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
