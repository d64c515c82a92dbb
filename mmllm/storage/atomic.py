"""Folders that appear complete or not at all: written under a hidden name, synchronised, renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmllm.errors import CheckpointError
from mmllm.runtime.files import writing

# how network drives, and Windows, refuse to synchronise a folder: they do it by themselves, or cannot
NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


@contextmanager
def atomic_directory(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder to write into. It gets the name `folder` when all of it is on disk, and is removed on any error."""
    folder = Path(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists() and not replace:
        raise CheckpointError(f"{folder}: exists already; choose another name, or replace it with --force")
    with writing(folder), removed_on_error(new_directory(folder)) as temporary:
        yield temporary
        publish(temporary, folder)


def new_directory(folder: Path) -> Path:
    """An empty folder beside `folder`, under a hidden name."""
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder` once all of it is on disk; an old folder of that name is removed."""
    for file in [*temporary.rglob("*"), temporary]:
        fsync(file)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    fsync(folder.parent)


@contextmanager
def removed_on_error(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def fsync(path: Path) -> None:
    """Waits until the file, or the entries of the folder, are on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FOLDERS):
            raise
