"""Memory of the process: peak, free, and what malloc keeps."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

KEPT_BYTES, APART_BYTES = 2**30, 2**18  # larger blocks go back: in training, and of weights


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # by malloc.h


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use so far: on the GPU, or of the whole process.

    Linux's `ru_maxrss` starts at the peak of the process that started this one; VmHWM is this program's own.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return _bytes(status, "VmHWM")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # bytes on a Mac, else kilobytes


def forget_peak(device: torch.device) -> None:
    """Begins `peak_memory` anew at what is in use now, where the system can: on a GPU and on Linux."""
    status = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif status.exists():
        status.write_text("5")


def keep_freed_memory(device: torch.device) -> None:
    """Lets a process that trains on a CPU keep the memory that a step is done with, for the next one. What loading has
    left behind goes back first.

    glibc gives every block of over 32 MB back to the system at once, and new pages are dear: up to 2 of 4 seconds of a
    step went there. Elsewhere than in glibc nothing is changed.
    """
    libc = glibc() if device.type == "cpu" else None
    if libc:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def blocks_apart() -> Iterator[None]:
    """What is made inside lies in blocks of its own, which go back when they are freed, and what steps have left behind
    goes back first: for weights that come in another precision, of which each would leave a gap among the others."""
    libc = glibc()
    if libc:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_THRESHOLD, APART_BYTES)
    try:
        yield
    finally:
        if libc:
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is the one whose memory can be told what to keep."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None


def free_memory() -> int:
    """Bytes of main memory that can still be had, of the machine or of the container it is in; 0 where nobody tells."""
    machine, container = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not machine.exists():
        return 0
    free = _bytes(machine, "MemAvailable")
    limit = container / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        counts = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
        used = int((container / "memory.current").read_text()) - int(counts["inactive_file"])
        free = min(free, int(limit.read_text()) - used)
    return free


def _bytes(path: Path, name: str) -> int:
    """The line `name: 123 kB` of one of Linux's tables."""
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
