"""Everything that only a GPU can prove, in one command of less than nine minutes: `make gpu`.

A GPU is often rented for minutes, without a network. So each part has its own time limit, one that fails does not stop
the next, and all output and measurements lie in one folder. `python -m benchmarks gpu --device cpu` tries every part out
beforehand, with tiny models and nothing compiled.
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
GPU_TESTS = ("tests/inference/test_engine.py", "tests/kernels/test_gpu.py", "tests/training/test_experiment.py")


def parts(folder: Path, device: str) -> dict[str, tuple[int, list[str]]]:
    """The time limit in seconds and the command of each part by name; 535 seconds in all. On a CPU with tiny models."""
    rows, models = ["--device", device, "--out", str(folder)], ["--models", str(folder / "models")]
    rounds, samples, few = "3", "256", []
    cases = [part for name in ("stage 1", "stage 2, full", "stage 2, LoRA") for part in ("--case", name)]
    if device == "cpu":
        rounds, samples, cases = "1", "64", []
        few = ["--precision", "int8", "--batch", "1", "--batch", "2", "--new-tokens", "4"]
        rows += ["--size", "tiny"]
    run = ["data.batch_size=64", *(f"stage{n}.gradient_accumulation_steps=1" for n in (1, 2))]
    run += ["stage1.epochs=1", "stage2.epochs=1"] if device == "cpu" else []
    return {
        "tests": (100, ["-m", "pytest", "-m", "gpu", *GPU_TESTS]),
        "generate": (145, [*BENCH, "generate", *few, *rows, *models]),
        "train": (170, [*BENCH, "train", "--rounds", rounds, *cases, *rows]),
        "run": (90, [*BENCH, "rehearse", "--samples", samples, *rows, *models, *run]),
        "memory": (30, [*BENCH, "memory", "--case", "stage 2, full", "--bf16-only", *rows]),
    }


def measure_all(folder: Path, device: str = "cuda") -> int:
    """Run the parts in turn, with the output of each in `folder`/NAME.txt; returns the exit code, 1 when one failed."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("make gpu measures on a CUDA GPU, and there is none here; make bench measures on the CPU")
    dry = {"TORCHDYNAMO_DISABLE": "1"} if device == "cpu" else {}
    return run_parts(parts(folder, device), folder, **dry)


def run_parts(commands: dict[str, tuple[int, list[str]]], folder: Path, **environment: str) -> int:
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
                    env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        outcome = "took too long" if code is None else "ok" if code == 0 else f"failed with code {code}"
        print_rank0(f"{name}: {outcome}, {time.perf_counter() - begin:.0f} s; {folder / name}.txt")
        failed += code != 0
    return 1 if failed else 0
