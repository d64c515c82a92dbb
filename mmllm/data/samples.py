"""Records to samples: a sample is a conversation about some images, with its reference answers."""

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from mmllm.config.validation import did_you_mean, shown
from mmllm.data.archives import archive_kind, unpack
from mmllm.data.chat import IMAGE, MARK, Message, assistant, parse_text
from mmllm.data.formats import coco_folder, data_files, image_folder, read_records
from mmllm.data.records import KNOWN_KEYS, Turn, read_record, record_id, unread_keys
from mmllm.errors import DataError
from mmllm.runtime.console import stderr_rank0

UNFINISHED = "unfinished"  # a file in the folder of a public dataset that is not complete yet
MAX_SHARED = 16  # texts of one image in a sample: bounds how large a batch can get
OTHER_MARK = re.compile(r"<\|?image[ _-]?(\d+|pad|placeholder)\|?>", re.IGNORECASE)  # of other programs


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
    """The samples of a data file, or of several joined by commas, in any layout of formats.py, tables.py and records.py.
    Image names are relative to `image_dir` (default: the folder of the file).

    An image with several captions becomes one sample a caption, each with all of them as references. `split` chooses
    a part of Karpathy's files. Raises DataError naming the file, the record and the field.
    """
    samples = read_samples(path, image_dir, split)
    for index, sample in enumerate(samples):
        if sample.fault:
            name = "" if sample.id == str(index) else f" ({sample.id})"
            raise DataError(f"{path}: sample {index}{name}: {sample.fault}")
    return samples


def read_samples(
    path: str | Path, image_dir: str | Path | None = None, split: str | None = None, unpack_to: Path | None = None
) -> list[Sample]:
    """As `load_samples`, but a record that cannot be used becomes a sample with a `fault`.

    An archive is unpacked into a folder in `unpack_to`; None: it is refused.
    """
    samples: list[Sample] = []
    for number, file in enumerate(data_files(path)):
        folder = image_dir
        if unpack_to and archive_kind(file):
            has_images = unpack(file, unpack_to / str(number))
            file, folder = unpack_to / str(number), None if has_images else image_dir or file.parent
        samples += file_samples(file, folder, split, first=len(samples))
    if not samples:
        raise DataError(f"{path}: no samples in it")
    return samples


def file_samples(path: Path, image_dir: str | Path | None, split: str | None, first: int) -> list[Sample]:
    """The samples of one file or folder, whose records are numbered from `first`; reports the keys that are not read."""
    if (path.parent / UNFINISHED).exists():
        raise DataError(f"{path.parent}: `mmllm prepare` has not finished there; run it again")
    records = read_records(path, split)
    folder = coco_folder(Path(image_dir).expanduser() if image_dir else image_folder(path), records)
    samples: list[Sample] = []
    unread: Counter[str] = Counter()
    for number, record in enumerate(records, first):
        name = record_id(record, str(number))
        try:
            samples += record_samples(record, name, folder)
        except DataError as error:
            samples.append(Sample(name, (), (), fault=str(error)))
        unread.update(unread_keys(record))
    if unread:
        keys = (f"`{key}`{did_you_mean(key, KNOWN_KEYS)} of {count}" for key, count in sorted(unread.items()))
        stderr_rank0(f"{path}: not read: {', '.join(keys)} records")
    return samples


def record_samples(content: object, name: str, image_dir: Path) -> list[Sample]:
    """The samples of one record: one, or one per caption. A caption that cannot be trained on is a sample with a fault."""
    record = read_record(content)
    images = image_paths(record.images, image_dir)
    messages = to_messages(record.turns, len(images))
    references = tuple(text for text in record.references if isinstance(text, str) and text.strip())
    if not record.answers:
        return [Sample(name, images, messages, references, record.kind)]
    names = [name] if len(record.answers) == 1 else [f"{name}#{i}" for i in range(len(record.answers))]
    return [
        Sample(name, (), (), fault=fault)
        if (fault := answer_fault(answer, len(images)))
        else Sample(name, images, (*messages, assistant(answer)), references, record.kind)
        for name, answer in zip(names, record.answers, strict=True)
    ]


def image_paths(names: list[str], image_dir: Path) -> tuple[Path, ...]:
    """The paths of images, which must be inside `image_dir`."""
    for name in names:
        if not Path(os.path.abspath(image_dir / name)).is_relative_to(os.path.abspath(image_dir)):
            raise DataError(f"image {name!r} is outside the image directory {image_dir}; set data.image_dir to hold it")
    return tuple(image_dir / name for name in names)


def to_messages(turns: list[Turn], num_images: int) -> tuple[Message, ...]:
    """The messages of a conversation; images without a mark come first in the first question."""
    messages = []
    for number, (role, text, is_target) in enumerate(turns):
        fault = ""
        if role == "user" and (mark := OTHER_MARK.search(text)):
            fault = f"has {mark.group()}; write {MARK} where each image belongs, in their order"
        elif role == "assistant":
            fault = answer_fault(text, num_images)
        elif role == "system" and num_images and MARK in text:
            fault = f"has {MARK}, but is a system turn; images can only be in user turns"
        if fault:
            raise DataError(f"turn {number} {fault}")
        messages.append(Message(role, parse_text(text) if role == "user" else (text,), is_target))
    marks = sum(message.num_images for message in messages)
    if marks == 0 and num_images:
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise DataError("has no user turn to put its image into")
        messages[first] = Message("user", (*(IMAGE, "\n") * num_images, *messages[first].parts))
    elif marks != num_images:
        raise DataError(f"{MARK} marks: {marks}, images: {num_images}; mark every image, or none")
    return tuple(messages)


def answer_fault(answer: object, num_images: int) -> str:
    """Why an answer cannot be trained on, as the end of a sentence; "" when it can."""
    if not isinstance(answer, str):
        return f"has the answer {shown(answer)}; it must be a text"
    if not answer.strip():
        return "has an empty answer"
    if num_images and (MARK in answer or OTHER_MARK.search(answer)):
        return f"has an answer with {MARK} in it; images can only be in user turns"
    return ""


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
