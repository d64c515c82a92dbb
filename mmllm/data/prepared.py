"""Checked samples written as a data set of our own: one record a line, image names relative to one folder.

What `mmllm prepare` writes is what `train.py` would have read: the same samples, after the same checks.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from mmllm.data.image import ImageProcessor, decode
from mmllm.data.samples import Sample
from mmllm.runtime.files import sha256_of

ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def to_record(sample: Sample, names: dict[Path, str]) -> dict:
    """The record that is read back as `sample`; `names` gives each image its name in the data set."""
    record: dict = {"id": sample.id}
    if sample.images:
        record["images"] = [names[path] for path in sample.images]
    record["conversations"] = [
        {"from": ROLES[turn.role], "value": turn.text} | ({} if turn.is_target else {"weight": 0})
        for turn in sample.messages
    ]
    if sample.kind:
        record["kind"] = sample.kind
    if sample.references:
        record["references"] = list(sample.references)
    return record


def write_records(path: Path, samples: Iterable[Sample], names: dict[Path, str]) -> None:
    """Writes the data file: it gets its name when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(to_record(sample, names), ensure_ascii=False) + "\n")
    temporary.replace(path)


def image_names(images: Iterable[Path], how: str) -> dict[Path, str]:
    """A name for each image, relative to their common folder; .png where they are cropped."""
    images = sorted(set(images))
    folder = Path(os.path.commonpath([os.path.abspath(path.parent) for path in images] or ["."]))
    names = {path: Path(os.path.abspath(path)).relative_to(folder) for path in images}
    return {path: str(name if how != "crop" else Path(f"{name}.png")) for path, name in names.items()}


def place_image(source: Path, target: Path, how: str, processor: ImageProcessor) -> None:
    """Copies or links an image, or writes the square that the model will see ("crop"): a PNG with the same pixels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if how == "copy":
        shutil.copyfile(source, target)
    elif how == "link":
        target.symlink_to(source.resolve())
    else:
        processor.crop(decode(source)).save(target)


def drop_images_of(train: list[Sample], val: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The training samples without those whose image is in `val` too, by its bytes; and those that were dropped."""
    held_out = {sha256_of(path) for path in {path for sample in val for path in sample.images}}
    known = {path: sha256_of(path) in held_out for path in {path for sample in train for path in sample.images}}
    kept = [sample for sample in train if not any(known[path] for path in sample.images)]
    return kept, [sample for sample in train if any(known[path] for path in sample.images)]
