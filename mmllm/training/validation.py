"""How well is it going: validation loss, the image probe, sampled captions.

The surprising fact: a model that ignores the picture has a falling validation loss all the same. The probe gives each
text the picture of another sample: if that does not raise the loss, nothing is looked at.
Next: trainer.py.
"""

from collections.abc import Callable

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
    is_stopped: Callable[[], bool] = bool,
    read_image: ReadImage | None = None,
    *,
    world: World = ALONE,
) -> dict:
    """Mean loss of a target with the true pictures, and with each picture replaced by another one of its batch.

    The second is None where no batch has two pictures. `is_stopped` may end it early; the numbers then mean nothing.
    The processes share the batches. Each runs the model equally often, as a model that is spread over them demands.
    """
    data, bf16 = config.data, config.training.bf16
    sums = torch.zeros(4, dtype=torch.float64)  # loss and targets, then both with other pictures
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
        if is_stopped():
            break
        batch = batch.to(model.device)
        pixels = batch.pixels_N3SS
        others = pixels.roll(len(pixels) // 2, 0)
        with autocast(model.device, bf16):
            found = torch.stack(model(batch.ids_BT, batch.labels_BT, pixels, batch.segment_ids_BT)).cpu()
            if len(pixels) > 1 or world.size > 1:
                found_with_others = torch.stack(
                    model(batch.ids_BT, batch.labels_BT, others, batch.segment_ids_BT)
                ).cpu()
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
    """Those of this process's batches, every `world.size`-th of all; and a batch that does not count, where others
    have one more."""
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    own = batches[world.rank :: world.size]
    has_less = len(own) < -(-len(batches) // world.size)
    return [sample for batch in own for sample in batch], batches[0] if has_less else []


def sample_captions(
    model: MultimodalLLM,
    samples: list[Sample],
    is_stopped: Callable[[], bool] = bool,
    read_image: ReadImage | None = None,
) -> list[dict]:
    """What the model says to the last question of each sample, beside its answer."""
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
    use_static_step = False if is_sharded(model) else None
    answers = generate(
        model, prompts, settings, is_exact=False, use_static_step=use_static_step, is_cancelled=is_stopped
    )
    return [caption | {"answer": answer.text} for caption, answer in zip(captions, answers, strict=True)]
