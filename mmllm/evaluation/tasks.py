"""What a model is asked about which images, and its answers."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mmllm.data.batches import prefetch
from mmllm.data.chat import Message
from mmllm.data.checks import image_fault
from mmllm.data.records import CAPTION_PROMPT
from mmllm.data.samples import Sample
from mmllm.errors import DataError, ImageError
from mmllm.inference.engine import generate
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import GenerationConfig, Prompt
from mmllm.runtime.console import stderr

CLIP_MEAN = (123, 117, 104)  # of the pixels that CLIP was trained on: what normalisation turns into zeros


@dataclass(frozen=True)
class Task:
    """One text to generate: the turns so far, their images, and the right answers. A task is a caption or a question."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    references: tuple[str, ...]
    kind: str
    is_caption: bool


def tasks_of(samples: list[Sample], task: str = "auto") -> list[Task]:
    """One task for each question and for each captioned image, with the references of all its samples.

    `task` is "caption", "question" or "auto": a sample is a caption if its kind says so or its prompt is the default.
    """
    tasks: dict[tuple, Task] = {}
    seen = set()
    for sample in samples:
        answers = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
        messages = sample.messages[: answers[-1]] if answers else sample.messages
        images = sample.images[: sum(message.num_images for message in messages)]
        asked = "".join(part for part in messages[-1].parts if isinstance(part, str)).strip() if messages else ""
        is_caption = task == "caption" or (task == "auto" and (sample.kind == "caption" or asked == CAPTION_PROMPT))
        record = record_of(sample)
        key = (messages, images) if is_caption else (messages, images, record)
        if (key, record) in seen:
            continue
        seen.add((key, record))
        if key in tasks:
            tasks[key] = replace(tasks[key], references=(*tasks[key].references, *sample.references))
        else:
            tasks[key] = Task(record, messages, images, sample.references, sample.kind, is_caption)
    return list(tasks.values())


def record_of(sample: Sample) -> str:
    """The id of the sample's record; samples of a record with several captions are numbered with `#`."""
    record, mark, number = sample.id.rpartition("#")
    is_numbered = mark and number.isdecimal() and int(number) < len(sample.references) > 1
    return record if is_numbered else sample.id


def check_images(tasks: list[Task]) -> None:
    """Raises DataError for images that are missing or visibly broken, before the model is loaded."""
    paths = sorted({path for task in tasks for path in task.images})
    faults = [fault for path in paths if (fault := image_fault(path))]
    if faults:
        raise DataError(f"{len(faults)} images cannot be used, the first is {faults[0]}")


def with_other_images(tasks: list[Task], seed: int) -> list[Task]:
    """The tasks with each image replaced by another one, the same in all tasks; [] if there is only one image."""
    paths = sorted({path for task in tasks for path in task.images})
    if len(paths) < 2:
        return []
    random.Random(seed).shuffle(paths)
    other = dict(zip(paths, paths[1:] + paths[:1], strict=True))
    return [replace(task, images=tuple(other[path] for path in task.images)) for task in tasks]


def with_blank_images(tasks: list[Task], path: Path) -> list[Task]:
    """The tasks with every image replaced by one of a single color, CLIP's mean, which is written to `path`."""
    Image.new("RGB", (224, 224), CLIP_MEAN).save(path)
    return [replace(task, images=(path,) * len(task.images)) for task in tasks]


def predict(
    pipeline: MultimodalInferencePipeline, tasks: list[Task], config: GenerationConfig, slots: int
) -> Iterator[str | None]:
    """The model's answer to each task, in order, `slots` of them at a time; images are read a few tasks ahead.

    None where an image cannot be decoded, which a line on stderr says: the other answers are not lost. An answer does not
    depend on the tasks beside it.
    """
    asked: list[int] = []

    def read(number: int) -> Prompt | ImageError:
        try:
            return pipeline.prompt(list(tasks[number].messages), list(tasks[number].images))
        except ImageError as error:
            return error

    def prompts() -> Iterator[Prompt]:
        for number, prompt in enumerate(prefetch(read, range(len(tasks)), num_workers=2)):
            if isinstance(prompt, ImageError):
                stderr(f"warning: {tasks[number].id} is left out: {prompt}")
            else:
                asked.append(number)
                yield prompt

    given = 0
    for number, answer in enumerate(generate(pipeline.model, prompts(), config, slots=slots)):
        yield from [None] * (asked[number] - given)
        yield answer.text.strip()
        given = asked[number] + 1
    yield from [None] * (len(tasks) - given)
