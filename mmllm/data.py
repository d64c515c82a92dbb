"""Data files to samples, samples to batches.

The surprising fact: nothing remembers where an epoch stood. The order of samples is a pure function of (seed, epoch,
index), so a run resumes from one integer, on any number of processes.

Read are: conversations (LLaVA's format) and {image, text, prompt}, as a JSON list or one object a line; {image,
captions}; COCO caption files; Karpathy's dataset_*.json; Flickr8k.token.txt.
Next: trainer.py.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmllm.chat import IGNORED, IMAGE, ChatProcessor, Encoded, Message, assistant, parse_text, user
from mmllm.errors import DataError, ImageError
from mmllm.image import check_size, open_checked, read

CAPTION_PROMPT = "Describe this image."
ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """A conversation about pictures. `references`: every right answer to its last question, for scores; `kind`: of question."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class BadSample:
    """Why a sample cannot be used."""

    index: int
    file: str
    reason: str


def load_samples(path: str | Path, image_dir: str | Path | None = None, split: str | None = None) -> list[Sample]:
    """The samples of a data file in any known format; pictures are looked for in `image_dir` (default: beside the file).

    A picture with several captions becomes one sample a caption, each with all of them as references. `split` chooses
    a part of Karpathy's files. Raises DataError naming the file, the record and the field.
    """
    path = Path(path)
    image_dir = path.parent if image_dir is None else Path(image_dir)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such data file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text; save it so") from error
    records = flickr_records(text, path) if path.suffix == ".txt" else json_records(text, path, split)
    samples = []
    for index, record in enumerate(records):
        try:
            samples += record_samples(record, str(index), image_dir)
        except DataError as error:
            raise DataError(f"{path}: record {index}: {error}") from None
    if not samples:
        raise DataError(f"{path}: no samples in it{f' for split {split!r}' if split else ''}")
    return samples


def json_records(text: str, path: Path, split: str | None) -> list[dict]:
    """The records of a JSON or JSONL file; COCO's and Karpathy's become {image, captions} records."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        content = json_lines(text, path, error)
    if isinstance(content, dict) and "annotations" in content and "images" in content:
        return coco_records(content, path)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return karpathy_records(content, split)
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: a list of records is needed, not {type(content).__name__}")
    return content


def json_lines(text: str, path: Path, whole: json.JSONDecodeError) -> list[dict]:
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                place = f"line {number}" if records else f"line {whole.lineno}"
                raise DataError(f"{path}: {place}: {error.msg}; a JSON list or one object a line is needed") from error
    return records


def coco_records(content: dict, path: Path) -> list[dict]:
    """COCO's captions_*.json."""
    captions = defaultdict(list)
    for number, annotation in enumerate(content["annotations"]):
        if not {"image_id", "caption"} <= annotation.keys():
            raise DataError(f"{path}: annotations[{number}] needs image_id and caption; is this a captions file?")
        captions[annotation["image_id"]].append(annotation["caption"].strip())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    unknown = sorted(captions.keys() - files.keys())
    if unknown:
        raise DataError(f"{path}: {len(unknown)} captions are of unknown images, first image_id {unknown[0]}")
    return [{"id": number, "image": files[number], "captions": texts} for number, texts in captions.items()]


def karpathy_records(content: dict, split: str | None) -> list[dict]:
    """Karpathy's dataset_coco.json and dataset_flickr*.json; "restval" belongs to "train"."""
    records = []
    for image in content["images"]:
        part = {"restval": "train"}.get(image["split"], image["split"])
        if split in (None, part):
            file = str(Path(image.get("filepath", "")) / image["filename"])
            captions = [sentence["raw"].strip() for sentence in image["sentences"]]
            records.append({"id": image.get("cocoid", image.get("imgid")), "image": file, "captions": captions})
    return records


def flickr_records(text: str, path: Path) -> list[dict]:
    """Flickr8k.token.txt: `name.jpg#0<tab>caption` a line."""
    captions = defaultdict(list)
    for number, line in enumerate(text.splitlines(), 1):
        name, tab, caption = line.partition("\t")
        if line.strip():
            if not tab or "#" not in name:
                raise DataError(
                    f"{path}: line {number}: not `name.jpg#0<tab>caption`; is this a token file of Flickr8k?"
                )
            captions[name.rpartition("#")[0]].append(caption.strip())
    return [{"image": name, "captions": texts} for name, texts in captions.items()]


def record_samples(record: dict, number: str, image_dir: Path) -> list[Sample]:
    """The samples of one record: one, or one per caption."""
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {type(record).__name__}")
    images = record_images(record, image_dir)
    name, kind = str(record.get("id", number)), str(record.get("kind", ""))
    if "conversations" in record:
        messages = conversation(record["conversations"], len(images))
        answers = [message.parts for message in messages if message.role == "assistant"]
        references = tuple(record.get("references", ())) or tuple("".join(parts) for parts in answers[-1:])
        return [Sample(name, images, messages, references, kind)]
    captions = record["captions"] if "captions" in record else [record["text"]] if "text" in record else None
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise DataError("needs `conversations` (a list of turns), `text`, or `captions` (a list of texts)")
    question = user(text_of(record, "prompt", CAPTION_PROMPT), images=len(images))
    return [
        Sample(
            name if len(captions) == 1 else f"{name}#{i}", images, (question, assistant(caption)), tuple(captions), kind
        )
        for i, caption in enumerate(captions)
    ]


def record_images(record: dict, image_dir: Path) -> tuple[Path, ...]:
    """The paths of a record's pictures, which must lie in `image_dir`."""
    names = record.get("images", record.get("image", []))
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError("`image` must be a file name (`images` a list of them)")
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"image {name!r} leaves the image directory; name it relative to data.image_dir")
    return tuple(image_dir / name for name in names)


def text_of(record: dict, field: str, default: str) -> str:
    value = record.get(field, default)
    if not isinstance(value, str):
        raise DataError(f"`{field}` must be a text")
    return value


def conversation(turns: object, num_images: int) -> tuple[Message, ...]:
    """The messages of LLaVA's `conversations`; pictures without a mark come first in the first question."""
    if not isinstance(turns, list) or not turns:
        raise DataError("`conversations` must be a list of turns")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f"conversations[{number}] needs `from` and `value`, both texts")
        role = ROLE_OF.get(turn.get("from"))
        if role is None:
            raise DataError(f"conversations[{number}].from is {turn.get('from')!r}; it can be {', '.join(ROLE_OF)}")
        parts = parse_text(turn["value"]) if role == "user" else (turn["value"],)
        messages.append(Message(role, parts))
    marks = sum(message.num_images for message in messages)
    if marks == 0 and num_images:
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise DataError("no turn of the user, so its picture has no place")
        messages[first] = Message("user", (*(IMAGE, "\n") * num_images, *messages[first].parts))
    elif marks != num_images:
        raise DataError(f"{marks} <image> marks for {num_images} pictures")
    return tuple(messages)


def check_samples(
    samples: list[Sample], processor: ChatProcessor, max_length: int, *, num_workers: int = 2
) -> list[BadSample]:
    """Every sample that cannot be trained on, in order: a picture that is missing, broken or too large, a text that
    does not fit. Pictures are judged by their headers; what is broken further in ends the run with the file's name."""
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        files = sorted({path for sample in samples for path in sample.images})
        reason_of = dict(zip(files, pool.map(image_fault, files, chunksize=64), strict=True))
    bad = []
    for index, sample in enumerate(samples):
        fault = next((str(path) for path in sample.images if reason_of[path]), "")
        reason = reason_of[Path(fault)] if fault else text_fault(sample, processor, max_length)
        if reason:
            bad.append(BadSample(index, fault or sample.id, reason))
    return bad


def image_fault(path: Path) -> str:
    """What is wrong with a picture's file, by its header; "" when nothing is."""
    try:
        check_size(open_checked(read(path), path.name), path.name)
    except ImageError as error:
        return str(error)
    return ""


def text_fault(sample: Sample, processor: ChatProcessor, max_length: int) -> str:
    try:
        processor.encode(list(sample.messages), max_length)
    except DataError as error:
        return str(error)
    return ""


def keep_good(
    samples: list[Sample], bad: list[BadSample], policy: str, max_fraction: float, report: Path, source: str
) -> list[Sample]:
    """The samples without the bad ones under policy "skip" (they are listed in `report`); DataError under "error", or
    when more than `max_fraction` are bad."""
    if not bad:
        return samples
    first = f"{bad[0].file} (sample {bad[0].index}): {bad[0].reason}"
    if policy == "error":
        raise DataError(f"{source}: {len(bad)} bad samples, first {first}; mend them, or set data.bad_samples=skip")
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("w", encoding="utf-8") as file:
        for row in bad:
            file.write(json.dumps({"index": row.index, "file": row.file, "reason": row.reason}) + "\n")
    if len(bad) > max_fraction * len(samples):
        raise DataError(
            f"{source}: {len(bad)} of {len(samples)} samples are bad, more than data.max_bad_fraction={max_fraction}; "
            f"all are listed in {report}, first {first}"
        )
    dropped = {row.index for row in bad}
    return [sample for index, sample in enumerate(samples) if index not in dropped]


def sample_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation that depends on nothing but its arguments."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples).tolist()


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: ids and labels (B, T), pixels of all their pictures in order (N, 3, S, S), N may be 0."""

    ids_BT: Tensor
    labels_BT: Tensor
    pixels_N3SS: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in (self.ids_BT, self.labels_BT, self.pixels_N3SS)))


def collate(rows: list[Encoded], pixels: list[Tensor], pad_id: int, image_size: int) -> Batch:
    """One batch of encoded conversations and their pictures."""
    length = max(len(row.ids) for row in rows)
    ids_BT = torch.full((len(rows), length), pad_id)
    labels_BT = torch.full((len(rows), length), IGNORED)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row.ids)] = torch.tensor(row.ids)
        labels_BT[i, : len(row.labels)] = torch.tensor(row.labels)
    return Batch(ids_BT, labels_BT, torch.stack(pixels) if pixels else torch.zeros(0, 3, image_size, image_size))


class BatchLoader:
    """Micro-batches of `samples`, made ahead by `num_workers` threads (decoding a picture frees the interpreter).

    `batches(epoch, start)` gives those of an epoch from number `start` on. With `world_size` processes each one gets its
    own slice of every global batch; the last samples that fill no batch are left to the next epoch's order.
    """

    def __init__(
        self,
        samples: list[Sample],
        processor: ChatProcessor,
        batch_size: int,
        *,
        seed: int = 0,
        max_length: int | None = None,
        num_workers: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.samples, self.processor = samples, processor
        self.batch_size, self.seed, self.max_length, self.num_workers = batch_size, seed, max_length, num_workers
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Micro-batches of an epoch, for each process."""
        return len(self.samples) // (self.batch_size * self.world_size)

    def indices(self, epoch: int, number: int) -> list[int]:
        """The samples of this process's micro-batch `number`."""
        return self._indices(sample_order(len(self.samples), self.seed, epoch), number)

    def _indices(self, order: list[int], number: int) -> list[int]:
        start = (number * self.world_size + self.rank) * self.batch_size
        return order[start : start + self.batch_size]

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = sample_order(len(self.samples), self.seed, epoch)
        numbers = range(start, len(self))
        yield from prefetch(lambda number: self.make(self._indices(order, number)), numbers, self.num_workers)

    def make(self, indices: list[int]) -> Batch:
        """The batch of the samples at `indices`."""
        return make_batch([self.samples[i] for i in indices], self.processor, self.max_length)


def make_batch(samples: list[Sample], processor: ChatProcessor, max_length: int | None = None) -> Batch:
    """The batch of `samples`, in order."""
    rows = [processor.encode(list(sample.messages), max_length) for sample in samples]
    pixels = [processor.image_processor(path) for sample in samples for path in sample.images]
    return collate(rows, pixels, processor.tokenizer.pad_id, processor.image_processor.size)


def prefetch(make: Callable[[int], Batch], numbers: range, num_workers: int) -> Iterator[Batch]:
    """`make(number)` for each number, in order, made by threads a few ahead; 0 workers: made when asked for."""
    if num_workers == 0:
        yield from map(make, numbers)
        return
    waiting: list[Future[Batch]] = []
    with ThreadPoolExecutor(num_workers, thread_name_prefix="batch") as pool:
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > 2 * num_workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
