"""Tables and folders of captioned images to records.

    image,caption           a header that names both columns, and rows separated by a comma, tab, `;` or `|`: captions.txt of
                            Kaggle's Flickr8k, results.csv of Flickr30k, metadata.csv of Hugging Face
    a.jpg<tab>A cat.        no header: name and caption of an image a line
    a.jpg#0<tab>A cat.      the same with a number: Flickr8k.token.txt, results_20130124.token
    a folder                a.txt beside each a.jpg, in it or in its subfolders

Captions of the same image become one record.
"""

import csv
import io
import re
from pathlib import Path

from mmllm.config.validation import shown
from mmllm.data.records import ANSWER_KEYS, ID_KEYS, IMAGE_KEYS, QUESTION_KEYS, TEXT_KEYS, first_of
from mmllm.errors import DataError

DELIMITERS = "\t|,;"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def table_records(text: str, path: Path) -> list[dict | DataError]:
    """The records of a table; a row that does not fit it is a DataError. The first delimiter in the first line counts."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = min((d for d in DELIMITERS if d in first), key=first.index, default=None)
    header = [cell.strip(' "').lower() for cell in first.split(delimiter)]
    if delimiter and {*header} & {*IMAGE_KEYS} and {*header} & {*TEXT_KEYS, *ANSWER_KEYS}:
        return grouped(header_rows(text, delimiter, header))
    if delimiter and name_in(first.partition(delimiter)[0]).lower().endswith(IMAGE_SUFFIXES):
        return grouped(plain_rows(text, delimiter))
    raise DataError(
        f"{path}: neither JSON nor a table: it begins with {shown(first)}; a table needs a header with `image` and "
        "`caption`, or lines of an image's name, a tab and its caption"
    )


def header_rows(text: str, delimiter: str, header: list[str]) -> list[dict | DataError]:
    """The rows under a header. Only comma and semicolon use quotes: captions may begin with one."""
    quoting = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, skipinitialspace=True)
    rows: list[dict | DataError] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if len(cells) != len(header) and any(cells):
                rows.append(DataError(f"line {reader.line_num} has {len(cells)} columns, the header has {len(header)}"))
            elif any(cells):
                texts = TEXT_KEYS + ANSWER_KEYS  # an empty one is a fault, other empty cells are absent
                rows.append({key: cell for key, cell in zip(header, cells, strict=True) if cell or key in texts})
    except csv.Error as error:
        rows.append(DataError(f"line {reader.line_num}: {error}"))
    return rows[1:]


def plain_rows(text: str, delimiter: str) -> list[dict | DataError]:
    rows: list[dict | DataError] = []
    for number, line in enumerate(text.split("\n"), 1):
        name, found, caption = line.partition(delimiter)
        if found:
            rows.append({"image": name_in(name), "caption": caption.strip()})
        elif line.strip():
            rows.append(DataError(f"line {number}: {shown(line)} has no caption after {shown(delimiter)}"))
    return rows


def name_in(cell: str) -> str:
    """The file name in a cell, without the number of its caption."""
    return re.sub(r"#\d+$", "", cell.strip())


def grouped(rows: list[dict | DataError]) -> list[dict | DataError]:
    """The rows with those that caption the same image, under the same id if any, in one, in the place of the first."""
    records: list[dict | DataError] = []
    place: dict[tuple[object, object], int] = {}
    for row in rows:
        key = first_of(row, TEXT_KEYS)[0] if isinstance(row, dict) else ""
        if not key or first_of(row, QUESTION_KEYS)[0]:
            records.append(row)
            continue
        image = first_of(row, IMAGE_KEYS)[1]
        name = first_of(row, ID_KEYS)[1] if first_of(row, ID_KEYS)[0] else image
        if (image, name) in place:
            records[place[image, name]][key].append(row[key])
        else:
            place[image, name] = len(records)
            records.append({"id": name} | row | {key: [row[key]]})
    return records


def folder_records(folder: Path) -> list[dict | DataError]:
    """A record for each image below `folder`, captioned by the text file beside it."""
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(f"{folder}: has neither images with a .txt beside each, nor metadata.jsonl or metadata.csv")
    records: list[dict | DataError] = []
    for image in images:
        name, text = image.relative_to(folder).as_posix(), image.with_suffix(".txt")
        try:
            records.append({"id": name, "image": name, "text": text.read_text(encoding="utf-8-sig").strip()})
        except (OSError, UnicodeDecodeError):
            records.append(DataError(f"{name} has no {text.name} beside it that can be read as UTF-8"))
    return records
