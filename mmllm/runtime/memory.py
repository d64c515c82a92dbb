"""Memory of this process: its peak, what is free, and what malloc keeps of freed blocks."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES, RETURNED_BYTES = 2**30, 2**18  # larger blocks go back to the system: of steps, of weights


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: on the GPU, or of the whole process; 0 where the system does not say.

    On Linux VmHWM, not `ru_maxrss`, which starts at the peak of the process that started this one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return _bytes(status, "VmHWM")
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # bytes on a Mac, else kilobytes


def keep_freed_memory(device: torch.device) -> None:
    """Reuse freed buffers while training on a CPU. What loading has left behind goes back to the system first.

    glibc returns each freed block of over 32 MB at once, and fresh pages are slow: up to 2 of the 4 seconds of a step.
    Without glibc nothing changes.
    """
    return_freed_memory()
    libc = _glibc() if device.type == "cpu" else None
    if libc:
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Gives the system what was freed, which glibc keeps for later: after a load, hundreds of megabytes."""
    libc = _glibc()
    if libc:
        libc.malloc_trim(0)


@contextmanager
def blocks_apart() -> Iterator[None]:
    """Tensors made inside lie in mappings of their own, which go back to the system when they are freed.

    For weights that change precision: among the buffers of steps each would leave a gap.
    """
    libc = _glibc()
    if libc:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)
    try:
        yield
    finally:
        if libc:
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def free_memory() -> int:
    """Free bytes of main memory, of the machine or of the container it is in; 0 where the system does not say."""
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


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it has glibc's settings of malloc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None


def _bytes(path: Path, name: str) -> int:
    """The value of the line `name: 123 kB` in a table of /proc."""
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
