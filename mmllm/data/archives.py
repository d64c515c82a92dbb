"""Archives with images inside: `mmllm prepare` unpacks them into an image folder with a metadata.jsonl, see formats.py.

    parquet    of Hugging Face datasets: images as {bytes, path}, and columns with the names of records.py
    tar        of webdataset, also compressed: 000.jpg beside 000.txt or 000.json    https://github.com/webdataset/webdataset

Training itself reads files only: a tar has no index, and a row of a parquet file costs the row group that it is in.
"""

import gzip
import json
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mmllm.config.validation import shown
from mmllm.data.records import ANSWER_KEYS, IMAGE_KEYS, TEXT_KEYS, TURN_KEYS, as_list
from mmllm.data.tables import IMAGE_SUFFIXES
from mmllm.errors import DataError
from mmllm.runtime.console import stderr_rank0

METADATA = "metadata.jsonl"
SUFFIX_OF = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"RI": ".webp", b"BM": ".bmp"}
ROWS_AT_ONCE = 64


def archive_kind(path: Path) -> str:
    """ "parquet" or "tar", by the content of the file; "" for any other."""
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        return "parquet" if is_parquet else "tar" if tarfile.is_tarfile(path) else ""
    except OSError:
        return ""


def refuse_archive(path: Path) -> None:
    """DataError for an archive where a data file is needed."""
    if kind := archive_kind(path):
        raise DataError(
            f"{path}: is a {kind} file; unpack it first: mmllm prepare {path} --out DIR, then use DIR/train.jsonl"
        )


def unpack(path: Path, folder: Path) -> bool:
    """Writes the records of an archive to `folder`/metadata.jsonl, and the images beside it; whether it had any images."""
    folder.mkdir(parents=True)
    read = parquet_records if archive_kind(path) == "parquet" else tar_records
    try:
        with (folder / METADATA).open("w", encoding="utf-8") as file:
            for row in read(path, folder):
                file.write(json.dumps(row, default=shown) + "\n")
    except (tarfile.TarError, EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is damaged ({error}); copy it again from its source") from error
    return any(entry.name != METADATA for entry in folder.iterdir())


def parquet_records(path: Path, folder: Path) -> Iterator[dict]:
    """The rows, with a file name in the place of each image."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    for batch in ParquetFile(path).iter_batches(ROWS_AT_ONCE):
        for row in batch.to_pylist():
            for key in row.keys() & {*IMAGE_KEYS}:
                images = enumerate(as_list(row[key]))
                row[key] = [image_file(image, folder, f"{number:08}-{key}-{i}") for i, image in images]
            yield row
            number += 1


def image_file(image: object, folder: Path, default: str) -> object:
    """The name of the file in `folder` that an image was written to; the path of one that is not in the archive.

    It is called as the archive says, or `default`, which no other image is called.
    """
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if not isinstance(content, bytes):
        return path or content
    name = PurePosixPath(path or "").name or default + SUFFIX_OF.get(content[:2], "")
    name = f"{default}-{name}" if (folder / name).exists() else name
    (folder / name).write_bytes(content)
    return name


def tar_records(path: Path, folder: Path) -> list[dict]:
    """A record for the members of each name, which they have in common up to the first dot."""
    records: dict[str, dict] = {}
    unread: Counter[str] = Counter()
    with tarfile.open(path) as archive:
        for member in archive:
            file, name = archive.extractfile(member) if member.isfile() else None, PurePosixPath(member.name)
            if file is None or name.name.startswith("."):
                continue
            stem, _, suffix = name.name.partition(".")
            key, suffix = str(name.parent / stem), suffix.lower()
            record = records.setdefault(key, {"id": key, "images": [], "text": None})
            if f".{suffix}".endswith(IMAGE_SUFFIXES):
                target = folder / safe(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as copy:
                    shutil.copyfileobj(file, copy)
                record["images"].append(str(safe(name)))
            elif suffix == "txt":
                record["text"] = file.read().decode("utf-8-sig", errors="replace").strip()
            elif suffix == "json" and isinstance(fields := json.loads(file.read()), dict):
                record |= fields
            else:
                unread[suffix] += 1
    if unread:
        stderr_rank0(f"{path}: not read: {', '.join(f'{count} files .{suffix}' for suffix, count in unread.items())}")
    for record in records.values():
        if any(record.get(key) for key in (*TURN_KEYS, *TEXT_KEYS, *ANSWER_KEYS) if key != "text"):
            record["text"] = None  # img2dataset writes the caption in both files
    return list(records.values())


def safe(name: PurePosixPath) -> PurePosixPath:
    """A member's name, which cannot lead out of the folder that it is unpacked to."""
    return PurePosixPath(*(part for part in name.parts if part not in ("/", "..")))
