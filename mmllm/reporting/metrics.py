"""The rows of metrics.jsonl, their copy in wandb, and the console line of a row.

A run that is interrupted and resumed goes on in the same file, so everything that reads it sees one run. wandb is
imported only by a run that asks for it, and its absence or failure never stops training.
"""

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmllm.runtime.console import duration, print_rank0, short, warned_of_disk
from mmllm.runtime.files import read_json, read_json_lines, write_atomically


class RunLog:
    """Appends rows to metrics.jsonl and to wandb. Rows after `last_step`, where a resumed run goes on, are dropped."""

    def __init__(self, directory: Path, last_step: int = 0, wandb_run: object = None):
        path = directory / "metrics.jsonl"
        rows = [row for row in read_metrics(directory) if row["step"] <= last_step] if last_step else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.path, self.file, self.unwritten = path, path.open("ab", buffering=0), bytearray()
        self.wandb_run = wandb_run

    def write(self, row: dict) -> None:
        """Append `row`. Where the disk is full, rows stay in memory and are written with later ones."""
        self.unwritten += json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with warned_of_disk(self.path):
            del self.unwritten[: self.file.write(self.unwritten)]
        if self.wandb_run:
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            with self._wandb_may_fail():
                self.wandb_run.log(numbers, row["step"])

    def close(self) -> None:
        self.file.close()
        if self.wandb_run:
            with self._wandb_may_fail():
                self.wandb_run.finish()

    @contextmanager
    def _wandb_may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # another program's: whatever it is, training continues
            print_rank0(f"warning: wandb failed ({error!r}); the run goes on without it")
            self.wandb_run = None


class NullLog:
    """The log of every rank but 0: it writes nothing."""

    def write(self, row: dict) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_metrics(directory: Path) -> list[dict]:
    """The rows of metrics.jsonl, or of another file named in place of a directory, without a last line that a crash cut
    off; none where there is no file."""
    return read_json_lines(directory if directory.is_file() else directory / "metrics.jsonl")


def read_settings(directory: Path) -> dict[str, object]:
    """The settings of experiment.json by dotted name; none where there is no such file."""
    path = directory / "experiment.json"
    return _flat(read_json(path)) if path.exists() else {}


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


METRICS = {"cider": "CIDEr", "vqa": "VQA accuracy"}  # what training.best_metric may be besides losses


def training_rows(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "loss" in row]


def loss_rows(rows: list[dict]) -> list[dict]:
    """The training rows whose loss is a cross-entropy: not those of stage 3, which have a reward."""
    return [row for row in training_rows(rows) if "reward" not in row]


def validation_rows(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "val_loss" in row]


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average that starts at the first value."""
    out: list[float] = []
    for value in values:
        out.append(keep * out[-1] + (1 - keep) * value if out else value)
    return out


def start_wandb(project: str, name: str, settings: dict) -> object:
    """A wandb run; None, after a line with the reason, where wandb is not installed, not logged in or unreachable."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        print_rank0("wandb is not installed (pip install wandb); the run goes on without it, see metrics.jsonl")
        return None
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and wandb.api.api_key is None:
        print_rank0("wandb is not logged in (wandb login, or WANDB_MODE=offline); the run goes on without it")
        return None
    try:
        return wandb.init(project=project, name=name, config=settings)
    except (wandb.Error, OSError) as error:
        print_rank0(f"wandb did not start ({error}); the run goes on without it")
        return None


def progress_line(row: dict, loss: float, total_steps: int) -> str:
    """The console line of a training row. `loss` is the smoothed one; the time left assumes the speed of this row."""
    parts = [
        f"step {row['step']}/{total_steps} {100 * row['step'] / total_steps:4.1f}%",
        f"reward {row['reward']:.3f} | kl {row['kl']:.3f}" if "reward" in row else f"loss {loss:.3f}",
        f"lr {row['learning_rate']:.1e}",
        f"|g| {row['grad_norm']:.2f}",
        f"{row['ms']:.0f} ms",
        f"{short(row['tokens_per_s'])} tok/s",
        f"{short(row['images_per_s'])} img/s",
        f"mfu {row['mfu']:.0%}" if row["mfu"] is not None else "mfu n/a",
        f"{row['peak_bytes'] / 1e9:.1f} GB",
        f"eta {duration((total_steps - row['step']) * row['ms'] / 1000)}",
    ]
    return " | ".join(parts)
