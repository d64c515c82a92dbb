"""Captions, or answers to several questions, for any number of images: what `mmllm caption` runs.

Images are decoded by threads a few ahead of the engine, which answers several at once; only their names are kept, so
memory does not grow with their number. Rows come in the order of the images, an image that cannot be used as a row with
its error. `RowFile` writes each row as it comes, so a run that is killed loses only the images in the engine's slots.
"""

import csv
import io
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mmllm.data.batches import prefetch
from mmllm.data.chat import user
from mmllm.errors import ImageError, UserError
from mmllm.inference.engine import generate
from mmllm.inference.pipeline import STORE_BYTES, MultimodalInferencePipeline
from mmllm.inference.request import GenerationConfig, Prompt
from mmllm.runtime.files import write_atomically


@dataclass(frozen=True)
class Row:
    """What was said about an image, or why it could not be used (`error`)."""

    image: str
    question: str
    answer: str = ""
    error: str = ""
    confidence: float | None = None  # of the answer, see Generated


def answer_images(
    pipeline: MultimodalInferencePipeline,
    images: list[tuple[str, Path]],
    questions: list[str],
    config: GenerationConfig,
    *,
    slots: int,
    num_workers: int = 2,
) -> Iterator[Row]:
    """A row for each question about each of `images`, given as (name in the rows, file), in order.

    Each image is encoded once for all questions, and what prompts have in common is computed once. UserError where a
    question leaves no room for its answer.
    """
    pending: deque[Row] = deque()  # in the order of the answers, and the rows with errors between them

    def read(number: int) -> Tensor | ImageError:
        try:
            return pipeline.processor.image_processor(images[number][1])
        except ImageError as error:
            return error

    def prompts() -> Iterator[Prompt]:
        ids = [tuple(pipeline.processor.encode_prompt([user(question, images=1)])) for question in questions]
        for (name, _), pixels in zip(images, prefetch(read, range(len(images)), num_workers), strict=True):
            if isinstance(pixels, ImageError):
                pending.extend(Row(name, question, error=str(pixels)) for question in questions)
                continue
            for question, prompt_ids in zip(questions, ids, strict=True):
                pending.append(Row(name, question))
                yield Prompt(prompt_ids, pixels[None])

    for answer in generate(pipeline.model, prompts(), config, slots=slots, store_bytes=STORE_BYTES):
        while pending[0].error:
            yield pending.popleft()
        yield replace(pending.popleft(), answer=answer.text.strip(), confidence=answer.confidence)
    yield from pending


class RowFile:
    """Rows in a .jsonl or .csv file that grows, and that a second run continues. Without `has_questions` an answer is
    called a caption. UserError for a file that holds something else."""

    def __init__(self, path: Path, has_questions: bool):
        self.path, self.is_csv, self.has_questions = path, path.suffix == ".csv", has_questions
        self.end = b"\r\n" if self.is_csv else b"\n"  # of a row; a newline inside a CSV field is "\n" alone
        self.columns = ["image", *(("question", "answer") if has_questions else ("caption",)), "confidence", "error"]
        self.file: io.BufferedWriter | None = None

    def read(self) -> list[Row]:
        """The rows of earlier runs; a last row that was cut off is removed from the file."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(self.end) + len(self.end)] if self.end in content else b""
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        text = whole.decode("utf-8", "surrogateescape")
        try:
            if self.is_csv:
                return [self._row(values) for values in csv.DictReader(io.StringIO(text, newline=""))]
            return [self._row(json.loads(line)) for line in text.split("\n") if line]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{self.path}: holds no rows of {', '.join(self.columns)}; name another file with --out, or remove it"
            ) from error

    def _row(self, values: dict) -> Row:
        error, confidence = values.get("error") or "", values.get("confidence")
        answer = "" if error else values["answer" if self.has_questions else "caption"]
        question = values["question"] if self.has_questions else ""
        return Row(values["image"], question, answer, error, float(confidence) if confidence else None)

    def write(self, row: Row) -> None:
        """Appends a row, which is in the file when this returns."""
        if self.file is None:
            self.file = self.path.open("ab")
            if self.is_csv and self.file.tell() == 0:
                self.file.write(self._csv(self.columns))
        self.file.write(self.encode(row))
        self.file.flush()

    def encode(self, row: Row) -> bytes:
        confidence = None if row.confidence is None else round(row.confidence, 4)
        answers = (row.question, row.answer) if self.has_questions else (row.answer,)
        values = dict(zip(self.columns, (row.image, *answers, confidence, row.error), strict=True))
        if self.is_csv:
            return self._csv(["" if value is None else str(value) for value in values.values()])
        empty = {"answer", "caption"} if row.error else {"error"}
        values = {name: value for name, value in values.items() if value is not None and name not in empty}
        return json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogateescape") + self.end

    def _csv(self, cells: list[str]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text).writerow([cell.replace("\r\n", "\n") for cell in cells])
        return text.getvalue().encode("utf-8", "surrogateescape")

    def replace(self, rows: Iterable[Row]) -> None:
        """Replaces all rows of the file, at once."""
        head = self._csv(self.columns) if self.is_csv else b""
        write_atomically(self.path, head + b"".join(map(self.encode, rows)))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class TextFiles:
    """A caption in a .txt file beside each image, as trainers of image generators read them; none for an error."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path_of(self, name: str) -> Path:
        return (self.folder / name).with_suffix(".txt")

    def is_done(self, name: str) -> bool:
        return self.path_of(name).exists()

    def write(self, row: Row) -> None:
        if not row.error:
            write_atomically(self.path_of(row.image), f"{row.answer}\n".encode())

    def close(self) -> None:
        """Nothing is open."""


def part_of(out: Path, rank: int) -> Path:
    """Where process `rank` writes until the end of the run."""
    return out.with_name(f"{out.name}.part{rank}")


def merge(out: Path, names: list[str], num_questions: int) -> set[str]:
    """Moves the rows of other processes into `out`, in the order of `names`. The names of images that are complete.

    `num_questions` is 0 for captions. An image with fewer rows is removed: it is done again.
    """
    parts = sorted(out.parent.glob(f"{out.name}.part*"))
    files = [RowFile(path, num_questions > 0) for path in (out, *parts)]
    found = [row for file in files for row in file.read()]
    counts = Counter(row.image for row in found)
    order = {name: number for number, name in enumerate(names)}
    complete = [row for row in found if counts[row.image] >= num_questions]
    rows = sorted(complete, key=lambda row: order.get(row.image, len(order)))
    if parts or rows != found:
        files[0].replace(rows)
    for path in parts:
        path.unlink()
    return {row.image for row in rows}
