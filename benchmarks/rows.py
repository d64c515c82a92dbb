"""Rows of benchmarks on disk, the goals they are measured against, and the parts of a table.

Nobody types a figure into docs/benchmarks.md. `python -m benchmarks table` makes its tables from the JSON lines under
benchmarks/, and a test compares the two, so no figure stands without its machine, commit and command.

A row belongs to a kind ("train", "generate", "memory", "rehearse"), a device ("cpu", "cuda"), a case and a contestant; a
newer row replaces an older one. The ratios of goals outlive their rows in history.jsonl.
"""

import datetime
import json
import os
import platform
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from mmllm.errors import UserError
from mmllm.runtime.files import read_json_lines
from mmllm.runtime.machine import commit

KEY = ("device", "case", "contestant")
HISTORY = "history"


def machine(device: torch.device) -> dict:
    """What the figures were measured on."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def stamped(rows: list[dict], device: torch.device, arguments: list[str]) -> list[dict]:
    """The rows with date, commit, machine and command."""
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(device),
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
    }
    return [{"device": device.type} | row | stamp for row in rows]


def save_rows(folder: Path, kind: str, rows: list[dict]) -> Path:
    """Writes the rows into `folder`/`kind`.jsonl, where each replaces an older one of the same key."""
    kept = {key(row): row for row in read_rows(folder, kind)} | {key(row): row for row in rows}
    return write_rows(folder, kind, kept.values())


def write_rows(folder: Path, kind: str, rows: Iterable[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.jsonl"
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
    return path


def read_rows(folder: Path, kind: str) -> list[dict]:
    return read_json_lines(folder / f"{kind}.jsonl")


def key(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


# Goals ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """`field` of the row (case, contestant), divided by that of `over` where it is given, at least or at most `bound`."""

    kind: str
    device: str
    text: str
    field: str
    row: tuple[str, str]
    bound: float
    over: tuple[str, str] | None = None
    at_most: bool = False

    def value(self, rows: list[dict]) -> float | None:
        """The measured value; None where a row is missing."""
        found = {(row["case"], row["contestant"]): row.get(self.field) for row in rows if row["device"] == self.device}
        top, bottom = found.get(self.row), 1.0 if self.over is None else found.get(self.over)
        return top / bottom if top is not None and bottom else None

    def usual(self, values: list[float]) -> float | None:
        """The median of the earlier `values` if the last two are both over 10 % worse; else None."""
        if len(values) < 3:
            return None
        *earlier, before, last = values
        usual = median(earlier)
        is_worse = min(before, last) > 1.1 * usual if self.at_most else max(before, last) < 0.9 * usual
        return usual if is_worse else None

    def line(self, rows: list[dict], history: list[dict]) -> tuple[str, str, str, str]:
        """What is measured, its value, the goal, and whether it is reached and worse than before."""
        value, bound = self.value(rows), f"{'at most' if self.at_most else 'at least'} {self.bound:g}"
        if value is None:
            return self.text, "not measured", bound, "-"
        usual = self.usual([entry["value"] for entry in measured(self, history)])
        is_met = "yes" if (value <= self.bound if self.at_most else value >= self.bound) else "no"
        return self.text, f"{value:.3g}", bound, is_met + (f"; {WORSE} {usual:.3g}" if usual else "")


WORSE = "over 10 % worse in two runs than before:"


def goal_lines(
    goals: tuple[Goal, ...], kind: str, rows: list[dict], device: str, history: list[dict] = ()
) -> list[tuple[str, str, str, str]]:
    return [goal.line(rows, history) for goal in goals if (goal.kind, goal.device) == (kind, device)]


# History --------------------------------------------------------------------------------------------------------------


def remember(folder: Path, kind: str, goals: tuple[Goal, ...]) -> None:
    """Adds the ratios of the rows to history.jsonl, where both sides were measured in one run, in turns."""
    runs: dict[tuple[str, ...], list[dict]] = {}
    for row in read_rows(folder, kind):
        runs.setdefault((row["date"], row["commit"], row["command"], row["device"]), []).append(row)
    found = [
        {"date": date, "commit": commit, "device": device, "ratio": goal.text, "value": round(value, 4)}
        for (date, commit, _, device), rows in runs.items()
        for goal in goals
        if goal.over and goal.kind == kind and (value := goal.value(rows)) is not None
    ]
    known = read_rows(folder, HISTORY)
    write_rows(folder, HISTORY, known + [entry for entry in found if entry not in known])


def measured(goal: Goal, history: list[dict]) -> list[dict]:
    """What history.jsonl has of a goal, the oldest first."""
    return [entry for entry in history if (entry["device"], entry["ratio"]) == (goal.device, goal.text)]


# Tables ---------------------------------------------------------------------------------------------------------------


def origin(rows: list[dict]) -> str:
    """Where, when and by which command the rows were measured, the newest command first."""

    def line(row: dict) -> str:
        where = row["machine"]
        device = where.get("gpu") or f"{where['threads']} threads of {where['cpu']}"
        return f"{device}, torch {where['torch']}, {row['date']}, commit {row['commit']}: `{row['command']}`"

    return "; ".join(dict.fromkeys(line(row) for row in sorted(rows, key=lambda row: row["date"], reverse=True)))


BEGIN, END = "<!-- benchmarks: python -m benchmarks table -->", "<!-- end of benchmarks -->"


def rewritten(text: str, content: str) -> str:
    """`text` with `content` between the two markers; UserError where one is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the page has no part between {BEGIN} and {END}; put both lines where the tables belong")
    return f"{before}{begin}\n{content}\n{end}{after}"
