"""Packed weights that several processes hold once, because each maps the same file."""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmllm.inference.optimize import cast_rest_, make_packed_
from mmllm.models.loading import read_info
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import stderr
from mmllm.runtime.files import writing
from mmllm.runtime.machine import cache_folder
from mmllm.storage.hub import locate


def packed_copy(source: str | Path, precision: str) -> Path:
    """The model directory `source` in int8 or int4: itself if packed, else a copy in the user's cache folder, made once.

    One copy of each directory is kept; it is made again when a file of the directory has changed.
    """
    folder = locate(source).resolve()
    if read_info(folder).packed:
        return folder
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]
    of_folder, of_files = (hashlib.sha256(repr(value).encode()).hexdigest()[:16] for value in (str(folder), files))
    copies = cache_folder() / precision
    copy = copies / f"{of_folder}-{of_files}"
    with writing(copies), locked_file(copies / f"{of_folder}.lock"):
        if not copy.exists():
            stderr(f"writing {folder.name} in {precision} once, to {copy}, for all workers")
            for old in copies.glob(f"{of_folder}-*"):
                shutil.rmtree(old)
            model = MultimodalLLM.from_pretrained(folder, dtype=None)
            make_packed_(model, precision)
            cast_rest_(model)  # as it will be loaded: a cast would be a copy in each process
            model.save_pretrained(copy)
    return copy


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock of this file, then holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
