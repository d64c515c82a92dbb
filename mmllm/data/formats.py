"""Data files to records, in every layout that is known, told apart by their content and never by their name.

    our own     a JSON list of records, or one record a line
    COCO        captions_train2014.json                                  https://cocodataset.org/#format-data
    Karpathy    dataset_coco.json, dataset_flickr8k.json, ...            https://cs.stanford.edu/people/karpathy/deepimagesent
    VQAv2       v2_OpenEnded_mscoco_train2014_questions.json and the annotations beside it  https://visualqa.org/download.html

A record is a JSON object: {image, text, prompt}, {image, captions} or {image, conversations}; records.py reads them.
tables.py has what is no JSON: tables, and folders of images with a text beside each.
"""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

from mmllm.config.validation import shown
from mmllm.data.tables import folder_records, table_records
from mmllm.errors import DataError

BINARY = {
    b"PAR1": "parquet",
    b"PK": "a zip or Excel file",
    b"\x1f\x8b": "compressed by gzip",
    b"\xff\xd8": "a JPEG image",
}


def data_files(source: str | Path) -> list[Path]:
    """The files and folders that `source` names, joined by commas."""
    whole = Path(source).expanduser()
    names = [source] if whole.exists() else str(source).split(",")
    return [Path(str(name).strip()).expanduser() for name in names]


def content_files(source: str | Path) -> list[Path]:
    """Every file whose content decides which samples `source` has: with VQAv2's annotations, or the texts of a folder."""
    found: list[Path] = []
    for path in data_files(source):
        path = metadata_in(path) or path
        found += sorted(path.rglob("*.txt")) if path.is_dir() else filter(None, (path, vqa_annotations(path)))
    return found


def image_folder(path: Path) -> Path:
    """Where the images of a data file are by default: beside it; those of a folder are in it."""
    return path if path.is_dir() else path.parent


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
    if "annotations" in content and "images" in content:
        return coco_records(content)
    if "annotations" in content:
        raise DataError(
            f"{path}: annotations without questions or images; for VQAv2, name the questions file beside it"
        )
    if isinstance(content.get("images"), list) and all(isinstance(image, dict) for image in content["images"]):
        return karpathy_records(content, path, split)
    return [content]


def coco_records(content: dict) -> list[dict | DataError]:
    """COCO's captions_*.json: a record an image, with all its captions."""
    captions, bad = defaultdict(list), []
    for number, annotation in enumerate(content["annotations"]):
        try:
            captions[annotation["image_id"]].append(stripped(annotation.get("caption")))
        except (AttributeError, KeyError, TypeError):
            bad.append(DataError(f"annotations[{number}] is {shown(annotation)}; it needs `image_id` and `caption`"))
    files = {image.get("id"): image.get("file_name") for image in content["images"] if isinstance(image, dict)}
    return [
        {"id": number, "image": files[number], "captions": texts}
        if files.get(number)
        else DataError(f"image_id {number}: `images` has no file_name of it")
        for number, texts in captions.items()
    ] + bad


def karpathy_records(content: dict, path: Path, split: str | None) -> list[dict | DataError]:
    """Karpathy's dataset_*.json; its "restval" counts as "train", as in the papers that use these splits."""
    parts = defaultdict(list)
    for number, image in enumerate(content["images"]):
        part = "train" if image.get("split") == "restval" else image.get("split")
        try:
            file = os.path.join(image.get("filepath") or "", image["filename"])
            captions = [stripped(sentence["raw"]) for sentence in image["sentences"]]
            parts[part].append({"id": image.get("cocoid", image.get("imgid")), "image": file, "captions": captions})
        except (AttributeError, KeyError, TypeError) as error:
            parts[part].append(DataError(f"images[{number}] needs `filename` and `sentences` with `raw`: {error!r}"))
    if split not in parts:
        raise DataError(f"{path}: has the splits {', '.join(map(str, parts))}, not {split!r}; choose one of them")
    return parts[split]


def stripped(text: object) -> object:
    return text.strip() if isinstance(text, str) else text


def vqa_annotations(questions: str | Path) -> Path | None:
    """The annotations file beside a file of VQAv2's questions, if there is one."""
    path = Path(questions)
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    return beside if beside != path and beside.exists() else None


def vqa_records(content: dict, path: Path) -> list[dict | DataError]:
    """VQAv2's questions with their annotations; without an annotations file beside it they have no answers."""
    beside = vqa_annotations(path)
    try:
        annotations = json.loads(read_text(beside))["annotations"] if beside else []
    except json.JSONDecodeError as error:
        raise DataError(f"{beside}: line {error.lineno}: {error.msg}; is the file complete?") from error
    annotation_of = {annotation["question_id"]: annotation for annotation in annotations}
    subtype = content["data_subtype"].replace("test-dev", "test")  # the questions of test-dev are about images of test
    records: list[dict | DataError] = []
    for number, question in enumerate(content["questions"]):
        try:
            annotation = annotation_of.get(question["question_id"], {})
            answers = [answer["answer"] for answer in annotation.get("answers", [])]
            turns = [{"from": "human", "value": question["question"]}]
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
        except (KeyError, TypeError, ValueError) as error:
            records.append(DataError(f"questions[{number}] or its annotation is incomplete: {error!r}"))
    return records
