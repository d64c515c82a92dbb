"""Small JSON files, one way to read them and one to write them, and the lock on a folder."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from mmllm.config.validation import describe, shown
from mmllm.errors import CheckpointError, RunError, UserError
from mmllm.runtime.console import stderr

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")


def read_json(
    path: Path, *, missing: str = "is its folder a model folder?", damaged: str = "copy it again from its source"
) -> dict:
    """The object in a JSON file. CheckpointError ends in `missing` or `damaged`: what the reader can do about it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {missing}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise CheckpointError(f"{path}: not JSON; {damaged}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; {damaged}")
    return content


def typed(kind: type[T], content: dict, where: str | Path) -> T:
    """The fields of `content` as the dataclass `kind`. Other fields are left out; one that is null counts as absent.

    CheckpointError names `where`, the field, its value and what it must be.
    """
    known = {field.name: content[field.name] for field in fields(kind) if content.get(field.name) is not None}
    try:
        # as JSON, because a strict dataclass is otherwise only made of its own kind
        return TypeAdapter(kind).validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {describe(error)}") from None


def read_json_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file; none where there is no file, and without a last line that a crash cut off.

    Lines end at newlines only: `str.splitlines` would also split at U+2028 or U+0085 inside a text.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def refuse_other(content: dict, supported: dict, where: str | Path) -> None:
    """CheckpointError for a setting in `content` that is there and has another value than the `supported` one."""
    for name, value in supported.items():
        if content.get(name) not in (None, value):
            raise CheckpointError(f"{where}: {name} is {shown(content[name])}; only {value!r} is supported")


def write_json(path: Path, content: object) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: a reader sees the old file or the new one. OSError where it cannot."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def writing(path: Path, mend: str = "nothing was left behind", kind: type[Exception] = RunError) -> Iterator[None]:
    """Turns an error of the disk into one line, an exception of `kind`, that names `path` and ends in `mend`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{path}: cannot be written ({error.strerror}); {mend}") from error


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which ends with the process however it ends; UserError where another one holds it.

    The file stays: if it were removed, two processes could hold the locks of two files of that name.
    """
    with (folder / "lock").open("a+") as file:
        try:
            if fcntl is None:
                raise OSError("this system has no such locks")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{folder}: another run is writing there ({file.read().strip()}); wait for its end, or choose another "
                "experiment_name"
            ) from error
        except OSError as error:  # some network drives
            stderr(f"warning: {folder}: cannot be locked ({error.strerror or error}); start no second run in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
