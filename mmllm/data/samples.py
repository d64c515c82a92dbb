"""Records to samples: a sample is a conversation about some images, with its reference answers."""

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from mmllm.data.chat import IMAGE, Message, assistant, parse_text
from mmllm.data.formats import read_records
from mmllm.errors import DataError

CAPTION_PROMPT = "Describe this image."
MAX_SHARED = 16  # texts of one image in a sample: bounds how large a batch can get
ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """A conversation about images.

    `references` are all correct answers to the last question, for scores; `kind` is the kind of that question.
    `shared` are further conversations about the same images, trained on together with this one, see packing.py.
    `fault` says why the record of the data file cannot be used; the sample is then empty.
    """

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    kind: str = ""
    fault: str = ""
    shared: tuple["Sample", ...] = ()


def load_samples(path: str | Path, image_dir: str | Path | None = None, split: str | None = None) -> list[Sample]:
    """The samples of a data file in any layout of formats.py; image names are relative to `image_dir` (default: the
    folder of the file).

    An image with several captions becomes one sample a caption, each with all of them as references. `split` chooses
    a part of Karpathy's files. Raises DataError naming the file, the record and the field.
    """
    samples = read_samples(path, image_dir, split)
    for index, sample in enumerate(samples):
        if sample.fault:
            raise DataError(f"{path}: sample {index}: {sample.fault}")
    return samples


def read_samples(path: str | Path, image_dir: str | Path | None = None, split: str | None = None) -> list[Sample]:
    """As `load_samples`, but a record that cannot be used becomes a sample with a `fault`."""
    path = Path(path)
    image_dir = path.parent if image_dir is None else Path(image_dir)
    samples: list[Sample] = []
    for number, record in enumerate(read_records(path, split)):
        try:
            samples += record_samples(record, str(number), image_dir)
        except DataError as error:
            samples.append(Sample(str(number), (), (), fault=str(error)))
    if not samples:
        raise DataError(f"{path}: no samples in it")
    return samples


def record_samples(record: dict, number: str, image_dir: Path) -> list[Sample]:
    """The samples of one record: one, or one per caption."""
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {type(record).__name__}")
    images = record_images(record, image_dir)
    name, kind = str(record.get("id", number)), str(record.get("kind", ""))
    if "conversations" in record:
        if "text" in record or "captions" in record:
            raise DataError("has `conversations` and also `text` or `captions`; keep one of them")
        messages = conversation(record["conversations"], len(images))
        answers = ["".join(message.parts) for message in messages if message.role == "assistant"]
        references = text_list(record, "references") if record.get("references") else answers[-1:]
        return [Sample(name, images, messages, tuple(references), kind)]
    if not images and "prompt" not in record:
        raise DataError("has neither an `image` nor a `prompt`, so its text answers nothing")
    captions = text_list(record, "captions" if "captions" in record else "text")
    question = conversation([{"from": "user", "value": record.get("prompt", CAPTION_PROMPT)}], len(images))
    names = [name] if len(captions) == 1 else [f"{name}#{i}" for i in range(len(captions))]
    return [
        Sample(name, images, (*question, assistant(caption)), tuple(captions), kind)
        for name, caption in zip(names, captions, strict=True)
    ]


def record_images(record: dict, image_dir: Path) -> tuple[Path, ...]:
    """The paths of a record's images, which must be inside `image_dir`."""
    names = record.get("images", record.get("image")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError("`image` must be a file name, `images` a list of them")
    for name in names:
        inside = os.path.normpath(image_dir / name)
        if not Path(inside).is_relative_to(os.path.normpath(image_dir)):
            raise DataError(f"image {name!r} is outside the image directory {image_dir}; set data.image_dir to hold it")
    return tuple(image_dir / name for name in names)


def text_list(record: dict, field: str) -> list[str]:
    """A field that holds a text or a list of texts, as a list."""
    value = record.get(field)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(item, str) for item in values):
        raise DataError(
            f"`{field}` must be a text or a list of texts"
            if field in record
            else "needs `conversations` (a list of turns), `text`, or `captions` (a list of texts)"
        )
    return values


def conversation(turns: object, num_images: int) -> tuple[Message, ...]:
    """The messages of LLaVA's `conversations`; images without a mark come first in the first question."""
    if not isinstance(turns, list) or not turns:
        raise DataError("`conversations` must be a list of turns")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise DataError(f"conversations[{number}] needs `from` and `value`, both texts")
        if turn["from"] not in ROLE_OF:
            raise DataError(f"conversations[{number}].from is {turn['from']!r}; it can be {', '.join(ROLE_OF)}")
        role = ROLE_OF[turn["from"]]
        messages.append(Message(role, parse_text(turn["value"]) if role == "user" else (turn["value"],)))
    marks = sum(message.num_images for message in messages)
    if marks == 0 and num_images:
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise DataError("has no user turn to put its image into")
        messages[first] = Message("user", (*(IMAGE, "\n") * num_images, *messages[first].parts))
    elif marks != num_images:
        raise DataError(f"<image> marks: {marks}, images: {num_images}; mark every image, or none")
    return tuple(messages)


def share_images(samples: list[Sample]) -> list[Sample]:
    """One sample for each image (or set of images), with the others about it as its `shared`; text alone stays.

    In the order of first appearance. An image with more than MAX_SHARED texts becomes several samples.
    """
    groups: dict[object, list[Sample]] = {}
    counts: Counter[tuple[Path, ...]] = Counter()
    for index, sample in enumerate(samples):
        part = counts[sample.images] // MAX_SHARED
        groups.setdefault((sample.images, part) if sample.images else index, []).append(sample)
        counts[sample.images] += 1
    return [replace(first, shared=tuple(others)) for first, *others in groups.values()]
