"""Lines for the reader: progress on stdout, notes and warnings on stderr."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def print_rank0(text: str) -> None:
    """One console line, at once: the reader may be a file that somebody follows. Of several processes the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def stderr_rank0(text: str) -> None:
    """One line beside the output proper, which may be an answer that somebody reads from a pipe."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def stderr(text: str) -> None:
    """One line of whichever process has something to say."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextmanager
def warned_of_disk(path: Path) -> Iterator[Path]:
    """What cannot be written to `path` is told, and stops no training: the weights are worth more than the notes."""
    try:
        yield path
    except OSError as error:
        stderr(f"warning: {path}: cannot be written ({error.strerror}); the run goes on")


def duration(seconds: float) -> str:
    """`12m40s`: two units are enough for a reader."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def short(number: float) -> str:
    """`9.9k`, `412`, `1.2M`: three digits of a rate."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}" if number < 100 * size else f"{number / size:.0f}{letter}"
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"
