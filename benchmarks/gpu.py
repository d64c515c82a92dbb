"""Everything that only a GPU can prove, in one command of less than nine minutes: `make gpu`.

A GPU is often rented for minutes, without a network. So each part has its own time limit, one that fails does not stop
the next, and all output and measurements lie in one folder.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmllm.errors import UserError
from mmllm.runtime.console import print_rank0

BENCH = ("-m", "benchmarks")


def parts(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """The time limit in seconds and the command of each part by name; 530 seconds in all."""
    rows, models = ["--out", str(folder)], ["--models", str(folder / "models")]
    run = ["data.batch_size=64", "stage1.gradient_accumulation_steps=1", "stage2.gradient_accumulation_steps=1"]
    return {
        "tests": (90, ["-m", "pytest", "-m", "gpu"]),
        "train": (120, [*BENCH, "train", "--device", "cuda", "--rounds", "5", *rows]),
        "generate": (170, [*BENCH, "generate", "--device", "cuda", *rows, *models]),
        "run": (120, [*BENCH, "rehearse", "--device", "cuda", "--samples", "256", *rows, *models, *run]),
        "memory": (30, [*BENCH, "memory", "--device", "cuda", "--case", "stage 2, full", "--bf16-only", *rows]),
    }


def measure_all(folder: Path) -> int:
    """Run the parts in turn, with the output of each in `folder`/NAME.txt; returns the exit code, 1 when one failed."""
    if not torch.cuda.is_available():
        raise UserError("make gpu measures on a CUDA GPU, and there is none here; make bench measures on the CPU")
    return run_parts(parts(folder), folder)


def run_parts(commands: dict[str, tuple[int, list[str]]], folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, (limit, command) in commands.items():
        begin = time.perf_counter()
        with (folder / f"{name}.txt").open("w", encoding="utf-8") as file:
            try:
                code = subprocess.run(
                    [sys.executable, *command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        outcome = "took too long" if code is None else "ok" if code == 0 else f"failed with code {code}"
        print_rank0(f"{name}: {outcome}, {time.perf_counter() - begin:.0f} s; {folder / name}.txt")
        failed += code != 0
    return 1 if failed else 0
