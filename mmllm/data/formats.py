"""Data files to records, in every layout that is known, told apart by their content and never by their name.

    our own     a JSON list of records, or one record a line
    COCO        captions_train2014.json                                  https://cocodataset.org/#format-data
    Karpathy    dataset_coco.json, dataset_flickr8k.json, ...            https://cs.stanford.edu/people/karpathy/deepimagesent
    VQAv2       v2_OpenEnded_mscoco_train2014_questions.json and the annotations beside it  https://visualqa.org/download.html
    OK-VQA      OpenEnded_mscoco_train2014_questions.json, as VQAv2                 https://okvqa.allenai.org/download.html
    GQA         train_balanced_questions.json                   https://cs.stanford.edu/people/dorarad/gqa/download.html
    TextVQA     TextVQA_0.5.1_train.json                                              https://textvqa.org/dataset
    VizWiz      Annotations/train.json                              https://vizwiz.org/tasks-and-datasets/vqa

A record is a JSON object: {image, text, prompt}, {image, captions} or {image, conversations}; records.py reads them.
tables.py has what is no JSON: tables, and folders of images with a text beside each; archives.py has archives.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from mmllm.data.archives import refuse_archive
from mmllm.data.tables import folder_records, grouped, table_records
from mmllm.errors import DataError

BINARY = {
    b"PK": "a zip or Excel file",
    b"\x1f\x8b": "compressed by gzip",
    b"\xff\xd8": "a JPEG image",
}
VIZWIZ_KEYS = {"image", "question", "answers", "answer_type", "answerable"}


def data_files(source: str | Path) -> list[Path]:
    """The files and folders that `source` names, joined by commas; `*` in a name stands for anything."""
    if (whole := Path(source).expanduser()).exists():
        return [whole]
    names = [Path(name.strip()).expanduser() for name in str(source).split(",")]
    return [
        file for name in names for file in (sorted(name.parent.glob(name.name)) if "*" in name.name else []) or [name]
    ]


def content_files(source: str | Path) -> list[Path]:
    """Every file whose content decides which samples `source` has: with VQAv2's annotations, or the texts of a folder."""
    found: list[Path] = []
    for path in data_files(source):
        path = metadata_in(path) or path
        refuse_archive(path)
        found += sorted(path.rglob("*.txt")) if path.is_dir() else filter(None, (path, vqa_annotations(path)))
    return found


def image_folder(path: Path) -> Path:
    """Where the images of a data file are by default: beside it; those of a folder are in it."""
    return path if path.is_dir() else path.parent


def coco_folder(folder: Path, records: list[dict | DataError]) -> Path:
    """The folder of COCO's images, which are named after it: `folder`, or train2014 or val2014 in it or beside it."""
    name = next((row["image"] for row in records if isinstance(row, dict) and isinstance(row.get("image"), str)), "")
    part = re.fullmatch(r"COCO_([a-z]+\d+)_\d+\.jpg", name)
    places = [folder / part[1], folder.absolute().parent / part[1]] if part and not (folder / name).exists() else []
    return next((place for place in places if (place / name).exists()), folder)


def metadata_in(folder: Path) -> Path | None:
    """The data file of a Hugging Face image folder."""
    return next((file for name in ("metadata.jsonl", "metadata.csv") if (file := folder / name).is_file()), None)


def read_records(path: Path, split: str | None = None) -> list[dict | DataError]:
    """The records of a data file or folder. `split` chooses a part of Karpathy's files; others have no parts.

    What cannot become a record is a DataError in its place. One that concerns the whole file is raised.
    """
    if path.is_dir() and not metadata_in(path):
        return folder_records(path)
    path = metadata_in(path) or path
    refuse_archive(path)
    text = read_text(path)
    return json_records(text, path, split) if text.lstrip()[:1] in ("[", "{", "") else table_records(text, path)


def read_text(path: Path) -> str:
    """The file as text; a byte order mark is dropped."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such data file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        kind = next((kind for start, kind in BINARY.items() if content.startswith(start)), "")
        mend = f"is {kind}, which is not read; export it as JSONL or CSV" if kind else "save it as UTF-8 text"
        raise DataError(f"{path}: cannot be read: {mend}") from error


def json_records(text: str, path: Path, split: str | None) -> list[dict | DataError]:
    """The records of a JSON or JSONL file."""
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
                f"{path}: looks like a file of COCO, Karpathy or VQAv2, but is incomplete: {error!r}"
            ) from error
    row = first_row(content)
    if "question" in row and row.keys() <= VIZWIZ_KEYS and str(row.get("image")).startswith("VizWiz_"):
        return vizwiz_records(content)
    if not isinstance(content, list):
        raise DataError(f"{path}: a list of records is needed, not {type(content).__name__}")
    return content


def json_lines(text: str, path: Path, error_of_file: json.JSONDecodeError) -> list[dict | DataError]:
    """One record a line. A first line that is not JSON means that the file was meant to be a single JSON value."""
    records: list[dict | DataError] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a text may hold U+2028
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if not records:
                    line, message = error_of_file.lineno, error_of_file.msg
                    raise DataError(f"{path}: line {line}: {message}; a list or one object a line is needed") from error
                records.append(DataError(f"line {number}: {error.msg}; one object a line is needed"))
    return records


def dataset_records(content: dict, path: Path, split: str | None) -> list[dict | DataError]:
    """The records of a JSON object: a public dataset, or the only line of a JSONL file."""
    if "questions" in content:
        return vqa_records(content, path)
    if "image_id" in first_row(content.get("data")):
        return textvqa_records(content)
    if "imageId" in first_row(list(content.values())):
        return gqa_records(content)
    if "annotations" in content and "images" in content:
        return coco_records(content)
    if "annotations" in content:
        raise DataError(
            f"{path}: annotations without questions or images; for VQAv2, name the questions file beside it"
        )
    images = content.get("images")
    if isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images):
        return karpathy_records(content, path, split)
    return [content]


def first_row(rows: object) -> dict:
    """The first of a list of objects; {} for anything else."""
    return rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}


def each(rows: list, name: str, needs: str, read: Callable[[dict], dict]) -> list[dict | DataError]:
    """`read` of each row; a DataError for one that lacks something it `needs`."""
    records: list[dict | DataError] = []
    for number, row in enumerate(rows):
        try:
            records.append(read(row))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            records.append(DataError(f"{name}[{number}] needs {needs}: {error!r}"))
    return records


def coco_records(content: dict) -> list[dict | DataError]:
    """COCO's captions_*.json: a record an image, with all its captions."""
    images = [image for image in content["images"] if isinstance(image, dict)]
    files = {image["id"]: image["file_name"] for image in images if {"id", "file_name"} <= image.keys()}
    captions = each(
        content["annotations"],
        "annotations",
        "a `caption` and the `image_id` of one of `images`",
        lambda row: {"id": row["image_id"], "image": files[row["image_id"]], "text": stripped(row.get("caption"))},
    )
    return grouped(captions)


def karpathy_records(content: dict, path: Path, split: str | None) -> list[dict | DataError]:
    """Karpathy's dataset_*.json; its "restval" counts as "train", as in the papers that use these splits."""
    parts = defaultdict(list)
    for image in content["images"]:
        parts["train" if image.get("split") == "restval" else image.get("split")].append(image)
    if split not in parts:
        raise DataError(f"{path}: has the splits {', '.join(map(str, parts))}, not {split!r}; choose one of them")

    def read(image: dict) -> dict:
        file = os.path.join(image.get("filepath") or "", image["filename"])
        captions = [stripped(sentence["raw"]) for sentence in image["sentences"]]
        return {"id": image.get("cocoid", image.get("imgid")), "image": file, "captions": captions}

    return each(parts[split], f"{split} images", "`filename`, and `sentences` with `raw`", read)


def stripped(text: object) -> object:
    return text.strip() if isinstance(text, str) else text


def vqa_annotations(questions: str | Path) -> Path | None:
    """The annotations file of a file of VQAv2's questions: beside it, or in `Annotations` beside its folder."""
    path = Path(questions)
    name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    places = (path.parent / name, path.absolute().parent.parent / "Annotations" / name)
    return next((place for place in places if place.exists() and name != path.name), None)


def vqa_records(content: dict, path: Path) -> list[dict | DataError]:
    """VQAv2's questions with their annotations; without an annotations file they have no answers."""
    file = vqa_annotations(path)
    try:
        annotations = json.loads(read_text(file))["annotations"] if file else []
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: {error.msg}; is the file complete?") from error
    annotation_of = {annotation["question_id"]: annotation for annotation in annotations}
    subtype = content["data_subtype"].replace("test-dev", "test")  # the questions of test-dev are about images of test

    def read(question: dict) -> dict:
        annotation = annotation_of.get(question["question_id"], {})
        answers = [answer["answer"] for answer in annotation.get("answers", [])]
        image, kind = f"COCO_{subtype}_{question['image_id']:012d}.jpg", annotation.get("answer_type", "")
        best = annotation.get("multiple_choice_answer")
        return question_record(question["question_id"], image, question["question"], answers, kind, best)

    return each(content["questions"], "questions", "`question_id`, `question` and the number of its image", read)


def question_record(
    question_id: object, image: str, question: str, answers: list[str], kind: str = "", best: str | None = None
) -> dict:
    """A question with its answers, of which `best`, or else the most common, is the target; with none in a test split."""
    turns = [{"from": "human", "value": question}]
    if answers:
        turns.append({"from": "assistant", "value": best or Counter(answers).most_common(1)[0][0]})
    return {"id": question_id, "image": image, "conversations": turns, "references": answers, "kind": kind}


def gqa_records(content: dict) -> list[dict | DataError]:
    def read(item: tuple[str, dict]) -> dict:
        number, row = item
        kind, answers = (row.get("types") or {}).get("structural", ""), [row["answer"]] if "answer" in row else []
        return question_record(number, f"{row['imageId']}.jpg", row["question"], answers, kind)

    return each(list(content.items()), "questions", "`question` and `imageId`", read)


def textvqa_records(content: dict) -> list[dict | DataError]:
    def read(row: dict) -> dict:
        return question_record(row["question_id"], f"{row['image_id']}.jpg", row["question"], row.get("answers", []))

    return each(content["data"], "data", "`question_id`, `image_id` and `question`", read)


def vizwiz_records(content: list) -> list[dict | DataError]:
    """The questions of VizWiz, which have no id: there is one an image."""

    def read(row: dict) -> dict:
        answers = [answer["answer"] for answer in row.get("answers", [])]
        return question_record(row["image"], row["image"], row["question"], answers, row.get("answer_type", ""))

    return each(content, "questions", "`image` and `question`", read)
