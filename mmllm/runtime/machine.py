"""What this process, its code and its machine are: how it was started, commit, processor, cache folder."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from mmllm.errors import RunError, UserError


def program() -> list[str]:
    """The words before the arguments of this process: `mmllm`, `python -m mmllm` or `python train.py`."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        return ["python", "-m", sys.modules["__main__"].__spec__.parent]
    return ["mmllm"] if name == "mmllm" else ["python", sys.argv[0]]


def commit() -> str | None:
    """The commit of this code, "-dirty" when files were changed since; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def cache_folder() -> Path:
    """The user's folder for compiled code; RunError where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmllm"
    except RuntimeError as error:
        raise RunError("no home folder for compiled code; set XDG_CACHE_HOME to a folder") from error


def refuse_without_compiler(option: str) -> None:
    """UserError where torch.compile, which `option` asks for, would find no C++ compiler."""
    compilers = shlex.split(os.environ["CXX"])[:1] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    if not any(map(shutil.which, compilers)):
        names = " or ".join(compilers)
        raise UserError(
            f"{option} needs a C++ compiler, and there is no {names} on the PATH; install one, or leave it out"
        )


def processor() -> str:
    """What -march=native depends on: the flags of /proc/cpuinfo, else the names of system and processor."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.exists() else []
    return flags[0] if flags else platform.platform() + platform.processor()
