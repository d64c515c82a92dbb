"""Validation: the loss, the image probe, sampled captions, and the metric that chooses the best model.

The validation loss falls even for a model that ignores the image. The probe gives each text the image of another sample:
if that does not raise the loss, the model does not look.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean

import torch

from mmllm.config.schema import ExperimentConfig, TrainingConfig
from mmllm.data.batches import ReadImage, allowed_broken, ordered_batches
from mmllm.data.chat import IMAGE
from mmllm.data.samples import Sample
from mmllm.errors import DataError, ImageError
from mmllm.evaluation.captions import caption_scores
from mmllm.evaluation.tasks import Task, tasks_of
from mmllm.evaluation.vqa import PEOPLE, is_answer, vqa_accuracy
from mmllm.inference.engine import SLOTS, generate
from mmllm.inference.request import GenerationConfig, Prompt
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import stderr
from mmllm.runtime.device import autocast
from mmllm.runtime.distributed import ALONE, World
from mmllm.training.fsdp import is_sharded

ANSWER_TOKENS = 40  # of a sampled caption or answer


@torch.no_grad()
def validation_losses(
    model: MultimodalLLM,
    samples: list[Sample],
    config: ExperimentConfig,
    batch_size: int,
    sync_stop: Callable[[bool], bool] = bool,
    read_image: ReadImage | None = None,
    *,
    world: World = ALONE,
) -> dict:
    """Mean loss of a target with the true images (`val_loss`), and with each image replaced by another of its batch.

    The second, `val_loss_shuffled`, is None where no batch has two images. `sync_stop` may end it early, with numbers
    that mean nothing; it is given whether this process has no batch because of a DataError, which all processes raise.
    The processes share the batches; each runs the model equally often, as a sharded model demands.
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
    error = None
    for number in range(-(-len(own + filler) // batch_size)):
        try:
            batch = next(batches)
        except DataError as caught:
            error = caught
        if sync_stop(error is not None):
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
    for reason in filter(None, world.all_gather(str(error or ""))):
        raise DataError(reason)
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
    tasks = [task for sample in samples for task in tasks_of([sample])]
    captions = []
    for sample, task, answer in zip(
        samples, tasks, generated_answers(model, tasks, sync_stop, read_image), strict=True
    ):
        if answer is None:
            continue
        last = task.messages[-1].parts if task.messages else ()
        asked = "".join(part for part in last if part is not IMAGE).strip()
        image = str(task.images[0].resolve()) if task.images else None
        reference = "".join(sample.messages[len(task.messages)].parts)
        captions.append({"id": sample.id, "image": image, "prompt": asked, "reference": reference, "answer": answer})
    return captions


def generated_answers(
    model: MultimodalLLM,
    tasks: list[Task],
    sync_stop: Callable[[], bool] = bool,
    read_image: ReadImage | None = None,
    slots: int | None = None,
) -> list[str | None]:
    """The model's greedy answer to each task, at most `slots` at a time; None where an image cannot be read.

    Every process generates all of them, because each call of a sharded model is a collective. All are None where the
    longest prompt leaves no room, and those that `sync_stop` cut short.
    """
    answers: list[str | None] = [None] * len(tasks)
    process = model.processor
    read_image, side = read_image or process.image_processor, process.image_processor.size
    ids = [tuple(process.encode_prompt(list(task.messages))) for task in tasks]
    room = model.config.text.max_position_embeddings - max(map(len, ids), default=0)
    if not tasks or room < 1:
        return answers
    asked: list[int] = []

    def prompts() -> Iterator[Prompt]:
        for number, task in enumerate(tasks):
            try:
                images = [read_image(path) for path in task.images]
            except ImageError as error:
                stderr(f"warning: sample {task.id} is left out: {error}")
                continue
            asked.append(number)
            yield Prompt(ids[number], torch.stack(images) if images else torch.zeros(0, 3, side, side))

    slots = min(slots or len(tasks), SLOTS[model.device.type])
    settings = GenerationConfig(max_new_tokens=min(ANSWER_TOKENS, room))
    static = False if is_sharded(model) else None
    generated = generate(
        model, prompts(), settings, slots=slots, is_exact=False, use_static_step=static, is_cancelled=sync_stop
    )
    for number, answer in enumerate(generated):
        if answer.finish_reason == "cancelled":
            break
        answers[asked[number]] = answer.text
    return answers


def generated_metric(
    model: MultimodalLLM,
    samples: list[Sample],
    training: TrainingConfig,
    slots: int,
    sync_stop: Callable[[], bool] = bool,
    read_image: ReadImage | None = None,
    world: World = ALONE,
) -> dict[str, float | None]:
    """CIDEr or accuracy of the model's answers by its name, where it is `training.best_metric`; {} when stopped."""
    tasks = metric_tasks(samples, training)
    answers = generated_answers(model, tasks, sync_stop, read_image, slots)
    if not tasks or sync_stop():
        return {}
    return {training.best_metric: world.on_rank0(lambda: metric_score(training.best_metric, tasks, answers))}


def metric_tasks(samples: list[Sample], training: TrainingConfig) -> list[Task]:
    """The captions (`cider`) or questions (`vqa`) among the first samples; all as such where there are none of them."""
    if training.best_metric == "val_loss":
        return []
    kind = "caption" if training.best_metric == "cider" else "question"
    texts = [text for sample in samples[: training.num_metric_samples] for text in (sample, *sample.shared)]
    tasks = [task for task in tasks_of(texts) if task.is_caption == (kind == "caption")] or tasks_of(texts, kind)
    return tasks[: training.num_metric_samples]


def metric_score(metric: str, tasks: list[Task], answers: list[str | None]) -> float | None:
    """CIDEr, or the mean accuracy: VQA's official one where several people answered, else whether it is a reference."""
    pairs = [
        (answer.strip(), task.references) for task, answer in zip(tasks, answers, strict=True) if answer is not None
    ]
    if not pairs:
        return None
    if metric == "cider":
        return caption_scores(*zip(*pairs, strict=True))["cider"]
    return fmean(vqa_accuracy(*pair) if len(pair[1]) >= PEOPLE else is_answer(*pair) for pair in pairs)


def check_metric(samples: list[Sample], training: TrainingConfig) -> None:
    """UserError before the first step where no reference holds a word, which no caption can be compared with."""
    tasks = metric_tasks(samples, training)
    metric_score(training.best_metric, tasks, [""] * len(tasks))
