"""report.md of a run, with loss.png, and run.json, which records how each start of the run came about.

All of it is made from the files of the run directory, so a run that was resumed five times reports as one.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

from mmllm.reporting.curves import draw_run
from mmllm.reporting.metrics import METRICS, read_metrics, read_settings, training_rows, validation_rows
from mmllm.runtime.console import duration, short, stderr
from mmllm.runtime.files import read_json, write_json
from mmllm.runtime.machine import commit, program

PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "pillow")


def record_start(
    directory: Path, *, device: str, origins: dict[str, str], resumed_from: str | None, data: Sequence[str]
) -> None:
    """Add this start to run.json: its command, where each setting came from (`origins`), versions, commit, and lines
    about its `data`."""
    path = directory / "run.json"
    starts = read_json(path)["starts"] if resumed_from and path.exists() else []
    start = {
        "command": shlex.join([*program(), *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "resumed_from": resumed_from,
        "settings_from": origins,
        "data": list(data),
        "device": device,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json(path, {"starts": [*starts, start]})


def write_report(directory: Path) -> None:
    """Write report.md and loss.png of the run in `directory`. OSError where they cannot be written."""
    rows = read_metrics(directory)
    start = read_json(directory / "run.json")["starts"][-1]
    evaluations = validation_rows(rows)
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    sections = [
        f"# {directory.name}",
        _curves(rows, directory / "loss.png"),
        _stages(rows),
        _image_probe(evaluations),
        _best_metric(evaluations),
        _captions(evaluations, directory),
        scores_tables(directory),
        "## How it was made",
        f"    {start['command']}",
        "\n".join(f"- {line}" for line in start.get("data", [])),
        f"{start['time']}, {start['device']}, {start['machine']}; commit {start['commit']}; {versions}",
        _settings(directory, start["settings_from"]),
        f"## Try it\n\n    python -m mmllm sample --model {directory / 'best_model'} --image x.jpg",
    ]
    (directory / "report.md").write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table in Markdown; with `numbers` every column but the first is aligned right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _curves(rows: list[dict], path: Path) -> str:
    try:
        draw_run(rows, path)
    except (ImportError, RuntimeError, ValueError) as error:  # a broken matplotlib must not stop training
        stderr(f"warning: {path}: cannot be drawn ({error}); the run goes on")
        return ""
    return f"![curves]({path.name})"


def _settings(directory: Path, origins: dict[str, str]) -> str:
    """The settings that are not defaults, with the value that the run ended with."""
    values = read_settings(directory)
    rows = [(name, f"`{json.dumps(values.get(name), ensure_ascii=False)}`", origin) for name, origin in origins.items()]
    return markdown_table(("setting", "value", "from"), rows)


def _stages(rows: list[dict]) -> str:
    """What each stage reached, and what its steps cost."""
    reached_head = ("loss, first 10", "loss, last 10", "validation")
    head = ("stage", "steps", *reached_head, "time", "tokens", "images", "peak memory")
    lines = []
    for stage in sorted({row["stage"] for row in rows}):
        mine = [row for row in rows if row["stage"] == stage]
        train, validation = training_rows(mine), validation_rows(mine)
        if not train:  # all steps so far were skipped
            continue
        what = "reward" if "reward" in train[-1] else "loss"  # stage 3 has both, and its loss says nothing
        values, seconds = [row[what] for row in train], [row["ms"] / 1000 for row in train]
        tokens, images = (
            sum(row[name] * s for row, s in zip(train, seconds, strict=True))
            for name in ("tokens_per_s", "images_per_s")
        )
        reached = [f"{'reward ' * (what == 'reward')}{fmean(part):.4f}" for part in (values[:10], values[-10:])]
        reached.append(f"{validation[-1]['val_loss']:.4f}" if validation else "-")
        peak = f"{max(row['peak_bytes'] for row in train) / 1e9:.1f} GB"
        cost = (duration(sum(seconds)), short(tokens), short(images), peak)
        lines.append((str(stage), str(len(train)), *reached, *cost))
    return markdown_table(head, lines, numbers=True)


def _image_probe(evaluations: list[dict]) -> str:
    """Whether the answers depend on the image: validation loss with the true images against those of other samples."""
    probed = [row for row in evaluations if row["val_loss_shuffled"] is not None]
    if not probed:
        return ""
    true, other = probed[-1]["val_loss"], probed[-1]["val_loss_shuffled"]
    looks = "the model looks at the image" if other > true * 1.02 else "the model hardly looks at the image"
    return f"Validation loss {true:.4f} with the true images, {other:.4f} with those of other samples: {looks}."


def _best_metric(evaluations: list[dict]) -> str:
    """The best validation by CIDEr or VQA accuracy, where the run measured one of them."""
    lines = []
    for metric, shown in METRICS.items():
        measured = [row for row in evaluations if row.get(metric) is not None]
        if measured:
            best = max(measured, key=lambda row: row[metric])
            lines.append(f"Best validation {shown}: {best[metric]:.4f}, at step {best['step']}.")
    return " ".join(lines)


def _captions(evaluations: list[dict], directory: Path) -> str:
    captions = evaluations[-1]["captions"] if evaluations else []
    if not captions:
        return ""
    lines = []
    for caption in captions:
        image = caption["image"]
        is_there = image and Path(image).exists()  # not where only features were given
        shown = f'<img src="{escape(os.path.relpath(image, directory))}" width="112">' if is_there else ""
        lines.append([shown, *(caption[name] for name in ("id", "prompt", "answer", "reference"))])
    return "## What it says\n\n" + markdown_table(("image", "sample", "prompt", "model", "reference"), lines)


def scores_tables(directory: Path) -> str:
    """The scores that the evaluation wrote beside the run."""
    tables = []
    for path in sorted(directory.glob("evaluation/*/scores.json")):
        found = read_json(path)
        tables.append(f"`{found['data']}`, answered by {found.get('checkpoint', found['model'])}:")
        for part in ("captions", "vqa", "answers"):
            rows = {name: scores[part] for name, scores in found["scores"].items() if part in scores}
            columns = [name for name, value in next(iter(rows.values()), {}).items() if isinstance(value, float)]
            lines = [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in rows.items()]
            tables += [markdown_table((part, *columns), lines)] * bool(columns)
    return "\n\n".join(["## Scores", *tables]) if tables else ""
