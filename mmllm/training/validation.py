"""Validation: the loss, the image probe, and sampled captions.

The validation loss falls even for a model that ignores the image. The probe gives each text the image of another sample:
if that does not raise the loss, the model does not look.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from mmllm.config.schema import ExperimentConfig
from mmllm.data.batches import ReadImage, allowed_broken, ordered_batches
from mmllm.data.chat import IMAGE
from mmllm.data.samples import Sample
from mmllm.errors import ImageError
from mmllm.inference.generate import generate
from mmllm.inference.request import GenerationConfig, Prompt
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import stderr
from mmllm.runtime.device import autocast
from mmllm.runtime.distributed import ALONE, World
from mmllm.training.fsdp import is_sharded

CAPTION_TOKENS = 40  # of a sampled caption


@torch.no_grad()
def validation_losses(
    model: MultimodalLLM,
    samples: list[Sample],
    config: ExperimentConfig,
    batch_size: int,
    sync_stop: Callable[[], bool] = bool,
    read_image: ReadImage | None = None,
    *,
    world: World = ALONE,
) -> dict:
    """Mean loss of a target with the true images (`val_loss`), and with each image replaced by another of its batch.

    The second, `val_loss_shuffled`, is None where no batch has two images. `sync_stop` may end it early, with numbers
    that mean nothing. The processes share the batches; each runs the model equally often, as a sharded model demands.
    """
    data, bf16 = config.data, config.training.bf16
    sums = torch.zeros(4, dtype=torch.float64)  # loss and targets, then both with other images
    own, filler = own_samples(samples, batch_size, world)
    batches = ordered_batches(
        own + filler,
        model.processor,
        batch_size,
        max_length=data.max_length,
        num_workers=data.num_workers,
        read_image=read_image,
        max_broken=allowed_broken(data, samples),
    )
    rounds = -(-len(own) // batch_size)
    for number, batch in enumerate(batches):
        if sync_stop():
            break
        batch = batch.to(model.device)
        pixels = batch.pixels_N3SS
        others = replace(batch, pixels_N3SS=pixels.roll(len(pixels) // 2, 0))
        with autocast(model.device, bf16):
            found = torch.stack(model(*vars(batch).values())).cpu()
            if len(pixels) > 1 or world.size > 1:
                found_with_others = torch.stack(model(*vars(others).values())).cpu()
        if number < rounds:
            sums[:2] += found
            if len(pixels) > 1:
                sums[2:] += found_with_others
    loss, targets, other_loss, other_targets = world.sum(sums.tolist())
    return {
        "val_loss": loss / max(1, targets),
        "val_loss_shuffled": other_loss / other_targets if other_targets else None,
    }


def own_samples(samples: list[Sample], batch_size: int, world: World) -> tuple[list[Sample], list[Sample]]:
    """The samples of this process's batches, and a batch that does not count where other processes have one more."""
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    own = batches[world.rank :: world.size]
    has_less = len(own) < -(-len(batches) // world.size)
    return [sample for batch in own for sample in batch], batches[0] if has_less else []


def sample_captions(
    model: MultimodalLLM,
    samples: list[Sample],
    sync_stop: Callable[[], bool] = bool,
    read_image: ReadImage | None = None,
) -> list[dict]:
    """The model's answer to the last question of each sample, beside the reference."""
    if not samples:
        return []
    process, prompts, captions = model.processor, [], []
    read_image, side = read_image or process.image_processor, process.image_processor.size
    for sample in samples:
        last = max(i for i, message in enumerate(sample.messages) if message.role == "assistant")
        question = list(sample.messages[:last])
        paths = sample.images[: sum(message.num_images for message in question)]
        try:
            pixels = torch.stack([read_image(path) for path in paths]) if paths else torch.zeros(0, 3, side, side)
        except ImageError as error:
            stderr(f"warning: sample {sample.id} is not shown: {error}")
            continue
        prompts.append(Prompt(tuple(process.encode_prompt(question)), pixels))
        asked = "".join(part for part in question[-1].parts if part is not IMAGE).strip() if question else ""
        image = str(paths[0].resolve()) if paths else None
        reference = "".join(sample.messages[last].parts)
        captions.append({"id": sample.id, "image": image, "prompt": asked, "reference": reference})
    if not prompts:
        return []
    room = model.config.text.max_position_embeddings - max(len(prompt.ids) for prompt in prompts)
    if room < 1:
        return []
    settings = GenerationConfig(max_new_tokens=min(CAPTION_TOKENS, room))
    static = False if is_sharded(model) else None
    answers = generate(model, prompts, settings, is_exact=False, use_static_step=static, is_cancelled=sync_stop)
    return [caption | {"answer": answer.text} for caption, answer in zip(captions, answers, strict=True)]
