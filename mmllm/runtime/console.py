"""Console lines and progress: results on stdout, notes, warnings and progress on stderr. Of several processes rank 0 prints."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
LINE_EVERY_S = 30.0  # of progress in a pipe or a log file


def print_rank0(text: str) -> None:
    """One line on stdout, flushed: the output may be a file that somebody follows."""
    if is_rank0():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def stderr_rank0(text: str) -> None:
    """One line on stderr: stdout may be an answer that another program reads."""
    if is_rank0():
        stderr(text)


def stderr(text: str) -> None:
    """One line on stderr, from whichever process calls it."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def is_rank0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def progress(items: Iterable[Item], total: int, what: str) -> Iterable[Item]:
    """The `items`, `total` of them, with their progress on stderr: a bar on a terminal, else a line every LINE_EVERY_S."""
    if not is_rank0():
        return items
    if not sys.stderr.isatty():
        return _with_lines(items, total, what)
    from tqdm import tqdm  # imported here: 40 ms that `--help` need not wait for

    return tqdm(items, what, total, leave=False, dynamic_ncols=True)


def _with_lines(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LINE_EVERY_S and done:
            last, left = now, (now - start) / done * (total - done)
            stderr(f"{what}: {done}/{total} after {duration(now - start)}, {duration(left)} left")
        yield item


@contextmanager
def warned_of_disk(path: Path) -> Iterator[Path]:
    """Warn if `path` cannot be written; training continues."""
    try:
        yield path
    except OSError as error:
        stderr(f"warning: {path}: cannot be written ({error.strerror}); the run goes on")


def duration(seconds: float) -> str:
    """Seconds in at most two units: `12m40s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def short(number: float) -> str:
    """A rate in two or three digits: `9.9k`, `412`, `1.2M`."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}" if number < 100 * size else f"{number / size:.0f}{letter}"
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"
