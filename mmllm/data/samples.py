"""Data files to samples, and what is wrong with those that cannot be used.

The surprising fact: a picture is judged by its first and its last bytes. To decode every one before the first step would
cost as much as reading an epoch; one that was cut off shows it at its end.

Read are: conversations (LLaVA's format) and {image, text, prompt}, as a JSON list or one object a line; {image,
captions}; COCO's caption files; Karpathy's dataset_*.json; Flickr8k.token.txt; VQAv2's questions with their annotations.
Next: batches.py.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mmllm.config.schema import DataConfig
from mmllm.data.chat import IMAGE, ChatProcessor, Message, assistant, parse_text
from mmllm.data.image import decode, open_checked
from mmllm.errors import DataError, ImageError

CAPTION_PROMPT = "Describe this image."
HEAD_BYTES = 1 << 16
SHARED_AT_MOST = 16  # texts of one picture in a sample: how large a batch gets stays foreseeable
END_OF = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """A conversation about pictures. `references` are all right answers to its last question, for scores; `kind` is that
    of the question; `fault` says why the record of the data file makes no sample; `shared` are further conversations
    about the same pictures, which are learnt with it and share its row."""

    id: str
    images: tuple[Path, ...]
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    kind: str = ""
    fault: str = ""
    shared: tuple["Sample", ...] = ()


@dataclass(frozen=True)
class BadSample:
    """Why the sample `index` cannot be used, and of which file or id it is."""

    index: int
    file: str
    reason: str


def load_samples(path: str | Path, image_dir: str | Path | None = None, split: str | None = None) -> list[Sample]:
    """The samples of a data file in any known format; pictures are looked for in `image_dir` (default: beside the file).

    A picture with several captions becomes one sample a caption, each with all of them as references. `split` chooses
    a part of Karpathy's files, other files have no parts. Raises DataError naming the file, the record and the field.
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
    text = read_text(path)
    samples: list[Sample] = []
    for number, record in enumerate(
        flickr_records(text, path) if path.suffix == ".txt" else json_records(text, path, split)
    ):
        try:
            samples += record_samples(record, str(number), image_dir)
        except DataError as error:
            samples.append(Sample(str(number), (), (), fault=str(error)))
    if not samples:
        raise DataError(f"{path}: no samples in it")
    return samples


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such data file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text; save it so") from error


def json_records(text: str, path: Path, split: str | None) -> list[dict]:
    """The records of a JSON or JSONL file; those of public datasets become {image, captions} or conversations."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        content = json_lines(text, path, error)
    if isinstance(content, dict):
        try:
            return dataset_records(content, path, split)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: looks like a file of COCO, Karpathy or VQAv2, but is not whole: {error!r}"
            ) from error
    if not isinstance(content, list):
        raise DataError(f"{path}: a list of records is needed, not {type(content).__name__}")
    return content


def json_lines(text: str, path: Path, whole: json.JSONDecodeError) -> list[dict]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold U+2028
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                line, message = (number, error.msg) if records else (whole.lineno, whole.msg)
                raise DataError(f"{path}: line {line}: {message}; a list or one object a line is needed") from error
    return records


def dataset_records(content: dict, path: Path, split: str | None) -> list[dict]:
    """The records of a JSON object: a public dataset, or the only line of a JSONL file."""
    if "questions" in content:
        return vqa_records(content, path)
    if "annotations" in content and "images" in content:
        return coco_records(content, path)
    if "annotations" in content:
        raise DataError(
            f"{path}: annotations without questions or images; name VQAv2's questions file, these lie beside it"
        )
    if isinstance(content.get("images"), list) and all(isinstance(image, dict) for image in content["images"]):
        return karpathy_records(content, path, split)
    return [content]


def coco_records(content: dict, path: Path) -> list[dict]:
    """COCO's captions_*.json."""
    captions = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"].strip())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    unknown = sorted(captions.keys() - files.keys())
    if unknown:
        raise DataError(f"{path}: {len(unknown)} captions are of unknown images, first image_id {unknown[0]}")
    return [{"id": number, "image": files[number], "captions": texts} for number, texts in captions.items()]


def karpathy_records(content: dict, path: Path, split: str | None) -> list[dict]:
    """Karpathy's dataset_coco.json and dataset_flickr*.json; "restval" belongs to "train"."""
    parts = defaultdict(list)
    for image in content["images"]:
        file = os.path.join(image.get("filepath", ""), image["filename"])
        captions = [sentence["raw"].strip() for sentence in image["sentences"]]
        record = {"id": image.get("cocoid", image.get("imgid")), "image": file, "captions": captions}
        parts["train" if image["split"] == "restval" else image["split"]].append(record)
    if split not in parts:
        raise DataError(f"{path}: holds the splits {', '.join(parts)}; {split!r} is none of them, say which")
    return parts[split]


def answers_beside(questions: str | Path) -> Path | None:
    """The file of VQAv2's answers beside a file of its questions, where there is one."""
    path = Path(questions)
    answers = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    return answers if answers != path and answers.exists() else None


def vqa_records(content: dict, path: Path) -> list[dict]:
    """VQAv2's questions, with the answers of the annotations file beside it (v2_mscoco_train2014_annotations.json for
    v2_OpenEnded_mscoco_train2014_questions.json); without one they have no answers."""
    beside = answers_beside(path)
    try:
        annotations = json.loads(read_text(beside))["annotations"] if beside else []
    except json.JSONDecodeError as error:
        raise DataError(f"{beside}: line {error.lineno}: {error.msg}; is the file whole?") from error
    annotation_of = {annotation["question_id"]: annotation for annotation in annotations}
    subtype = content["data_subtype"].replace("test-dev", "test")  # the questions of test-dev are about images of test
    records = []
    for question in content["questions"]:
        turns = [{"from": "human", "value": question["question"]}]
        annotation = annotation_of.get(question["question_id"], {"answers": []})
        answers = [answer["answer"] for answer in annotation["answers"]]
        if answers:
            best = annotation.get("multiple_choice_answer") or Counter(answers).most_common(1)[0][0]
            turns.append({"from": "assistant", "value": best})
        records.append(
            {
                "id": question["question_id"],
                "image": f"COCO_{subtype}_{question['image_id']:012d}.jpg",
                "conversations": turns,
                "references": answers,
                "kind": annotation.get("answer_type", ""),
            }
        )
    return records


def flickr_records(text: str, path: Path) -> list[dict]:
    """Flickr8k.token.txt: `name.jpg#0<tab>caption` a line."""
    captions = defaultdict(list)
    for number, line in enumerate(text.split("\n"), 1):
        name, tab, caption = line.partition("\t")
        if line.strip():
            if not tab or "#" not in name:
                raise DataError(f"{path}: line {number}: not `name.jpg#0<tab>caption`; is it Flickr8k.token.txt?")
            captions[name.rpartition("#")[0]].append(caption.strip())
    return [{"id": name, "image": name, "captions": texts} for name, texts in captions.items()]


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
        references = texts(record, "references") if record.get("references") else answers[-1:]
        return [Sample(name, images, messages, tuple(references), kind)]
    if not images and "prompt" not in record:
        raise DataError("has neither an `image` nor a `prompt`, so its text answers nothing")
    captions = texts(record, "captions" if "captions" in record else "text")
    question = conversation([{"from": "user", "value": record.get("prompt", CAPTION_PROMPT)}], len(images))
    names = [name] if len(captions) == 1 else [f"{name}#{i}" for i in range(len(captions))]
    references = tuple(captions)
    return [
        Sample(name, images, (*question, assistant(caption)), references, kind)
        for name, caption in zip(names, captions, strict=True)
    ]


def record_images(record: dict, image_dir: Path) -> tuple[Path, ...]:
    """The paths of a record's pictures, which must lie in `image_dir`."""
    names = record.get("images", record.get("image")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError("`image` must be a file name, `images` a list of them")
    for name in names:
        inside = os.path.normpath(image_dir / name)
        if not Path(inside).is_relative_to(os.path.normpath(image_dir)):
            raise DataError(f"image {name!r} is outside the image directory {image_dir}; set data.image_dir to hold it")
    return tuple(image_dir / name for name in names)


def texts(record: dict, field: str) -> list[str]:
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
    """The messages of LLaVA's `conversations`; pictures without a mark come first in the first question."""
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
            raise DataError("no turn of the user, so its picture has no place")
        messages[first] = Message("user", (*(IMAGE, "\n") * num_images, *messages[first].parts))
    elif marks != num_images:
        raise DataError(f"<image> marks: {marks}, pictures: {num_images}; each picture needs its mark, or none has one")
    return tuple(messages)


def checked_samples(
    path: str | Path,
    settings: DataConfig,
    processor: ChatProcessor,
    report: Path,
    *,
    split: str,
    limit: int | None = None,
    fault: Callable[[Path], str] | None = None,
) -> list[Sample]:
    """What `path` has for a run: the first `limit` samples, without the bad ones where `settings` allow some.

    `fault` says what is wrong with a picture, in place of `image_fault`.
    """
    samples = read_samples(path, settings.image_dir, split)[:limit]
    workers = settings.num_workers
    bad = check_samples(samples, processor, settings.max_length, num_workers=workers, fault=fault)
    good = keep_good(samples, bad, settings.bad_samples, settings.max_bad_fraction, report=report, source=str(path))
    return share_images(good) if settings.share_images else good


def share_images(samples: list[Sample]) -> list[Sample]:
    """One sample for each picture (or the same several), with the others about it as its `shared`; text alone stays.

    In the order of the first ones. A picture with more than SHARED_AT_MOST becomes several samples.
    """
    groups: dict[object, list[Sample]] = {}
    counts: Counter[tuple[Path, ...]] = Counter()
    for index, sample in enumerate(samples):
        part = counts[sample.images] // SHARED_AT_MOST
        groups.setdefault((sample.images, part) if sample.images else index, []).append(sample)
        counts[sample.images] += 1
    return [replace(first, shared=tuple(others)) for first, *others in groups.values()]


def check_samples(
    samples: list[Sample],
    processor: ChatProcessor,
    max_length: int,
    *,
    num_workers: int = 2,
    fault: Callable[[Path], str] | None = None,
) -> list[BadSample]:
    """Every sample that cannot be trained on, in order, and why.

    A picture is judged by `fault`, or by its header and by its end, unless these leave a doubt: this reads 64 kB a
    picture. One that is broken in between shows itself when it is used, see BatchLoader.
    """
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        files = sorted({path for sample in samples for path in sample.images})
        faults = pool.map(fault or image_fault, files)
        reason_of = {path: reason for path, reason in zip(files, faults, strict=True) if reason}
    bad = []
    for index, sample in enumerate(samples):
        broken = next((path for path in sample.images if path in reason_of), None)
        reason = reason_of[broken] if broken else sample.fault or text_fault(sample, processor, max_length)
        if reason:
            bad.append(BadSample(index, str(broken or sample.id), reason))
    return bad


def image_fault(path: Path, decode_all: bool = False) -> str:
    """What is wrong with a picture file; "" when nothing is."""
    if seems_whole(path) and not decode_all:
        return ""
    try:
        decode(path)
    except ImageError as error:
        return str(error)
    return ""


def seems_whole(path: Path) -> bool:
    """Whether a file begins as a JPEG or PNG within the limits and ends as one. Of other kinds nothing is known."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(-min(len(head), 16), os.SEEK_END)
            tail = file.read()
        kind = open_checked(head, path.name).format
    except (OSError, ValueError, ImageError):
        return False
    return kind in END_OF and tail.endswith(END_OF[kind])


def text_fault(sample: Sample, processor: ChatProcessor, max_length: int) -> str:
    """What is wrong with the texts of a sample; "" when nothing is."""
    try:
        if not surely_fits(sample, processor, max_length):
            processor.encode(list(sample.messages), max_length)
    except UnicodeEncodeError:
        return "a text holds half of a character (a lone surrogate); write the character whole"
    except DataError as error:
        return str(error)
    return ""


def surely_fits(sample: Sample, processor: ChatProcessor, max_length: int) -> bool:
    """Whether a sample that has an answer fits by its bytes alone: 600,000 captions in seconds, not in minutes.

    A token is at least one byte, NFC makes at most three bytes of one, and a turn adds five tokens.
    """
    parts = [part for message in sample.messages for part in message.parts if part is not IMAGE]
    most = 3 * sum(len(part.encode()) for part in [processor.system, *parts])
    most += 8 * (len(sample.messages) + 1) + (processor.num_image_tokens + 2) * len(sample.images)
    return most <= max_length and any(message.role == "assistant" for message in sample.messages)


def keep_good(
    samples: list[Sample], bad: list[BadSample], policy: str, max_fraction: float, *, report: Path, source: str
) -> list[Sample]:
    """The samples without the bad ones under policy "skip"; DataError under "error", or when more than `max_fraction`
    are bad. All bad ones are listed in `report`."""
    if not bad:
        if report.is_file():
            report.unlink()  # it is of another time
        return samples
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("w", encoding="utf-8") as file:
        for row in bad:
            file.write(json.dumps({"index": row.index, "file": row.file, "reason": row.reason}) + "\n")
    first = f"sample {bad[0].index} ({bad[0].file}): {bad[0].reason}"
    count = f"{source}: {len(bad)} of {len(samples)} samples are bad"
    if policy == "error":
        raise DataError(f"{count}; mend those listed in {report}, or set data.bad_samples=skip. The first is {first}")
    if len(bad) > max_fraction * len(samples):
        raise DataError(
            f"{count}, more than data.max_bad_fraction={max_fraction} allows; they are listed in {report}. "
            f"The first is {first}"
        )
    dropped = {row.index for row in bad}
    return [sample for index, sample in enumerate(samples) if index not in dropped]
