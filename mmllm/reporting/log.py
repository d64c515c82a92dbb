"""What a run leaves to read: console lines, metrics.jsonl, run.json, loss.svg and report.md.

The surprising fact: the report and the curve are made from the files of the run directory alone, so a run that was
interrupted and resumed five times reports as one. wandb is imported only by a run that asks for it, and its absence
never stops a run. No torch here. Next: checkpoint.py.
"""

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from types import ModuleType

from mmllm.runtime.console import duration, print_rank0, short, warned_of_disk
from mmllm.runtime.machine import commit

PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "pillow")


class RunLog:
    """Rows of metrics.jsonl, and their copy in wandb. `last_step` is where the run goes on: later rows are dropped."""

    def __init__(self, directory: Path, last_step: int = 0, wandb_run: object = None):
        path = directory / "metrics.jsonl"
        rows = [row for row in read_metrics(directory) if row["step"] <= last_step] if last_step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(path)
        self.path, self.file, self.unwritten = path, path.open("ab", buffering=0), bytearray()
        self.wandb_run = wandb_run

    def write(self, row: dict) -> None:
        """Rows for which there is no room stay in memory and are written with later ones."""
        self.unwritten += json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with warned_of_disk(self.path):
            del self.unwritten[: self.file.write(self.unwritten)]
        if self.wandb_run:
            with self.without_wandb():
                self.wandb_run.log(
                    {name: value for name, value in row.items() if isinstance(value, int | float)}, row["step"]
                )

    def close(self) -> None:
        self.file.close()
        if self.wandb_run:
            with self.without_wandb():
                self.wandb_run.finish()

    @contextmanager
    def without_wandb(self) -> Iterator[None]:
        """Whatever goes wrong in wandb, the run goes on without it."""
        try:
            yield
        except Exception as error:
            print_rank0(f"warning: wandb failed ({error!r}); the run goes on without it")
            self.wandb_run = None


class OtherLog:
    """What the other processes of a run write: nothing, the first one has it all."""

    def write(self, row: dict) -> None:
        """Not here."""

    def close(self) -> None:
        """Nothing was opened."""


def read_metrics(directory: Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line that was cut off by a crash is left out."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def start_wandb(project: str, name: str, settings: dict) -> object:
    """A wandb run, or None after one line that says why: an account is never demanded, nothing is asked."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        print_rank0(
            "wandb is not installed (pip install wandb); the run goes on without it, metrics.jsonl has every number"
        )
        return None
    if not _is_wandb_usable(wandb):
        print_rank0("wandb is not logged in (wandb login, or WANDB_MODE=offline); the run goes on without it")
        return None
    try:
        return wandb.init(project=project, name=name, config=settings)
    except (wandb.Error, OSError) as error:
        print_rank0(f"wandb did not start ({error}); the run goes on without it")
        return None


def _is_wandb_usable(wandb: ModuleType) -> bool:
    return os.environ.get("WANDB_MODE") in ("offline", "disabled") or wandb.api.api_key is not None


def record_start(directory: Path, *, device: str, origins: dict[str, str], resumed_from: str | None) -> None:
    """Add to run.json how this start of the run came about: command, settings and their origins, versions, commit."""
    path = directory / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if resumed_from and path.exists() else []
    starts.append(
        {
            "command": shlex.join(["python", *sys.argv]),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "resumed_from": resumed_from,
            "settings_from": origins,
            "device": device,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "commit": commit(),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
        }
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"starts": starts}, indent=2), encoding="utf-8")
    temporary.replace(path)


def progress_line(row: dict, loss: float, total_steps: int) -> str:
    """The line of one training row; `loss` is the smoothed one, the time left is at the speed of this row."""
    mfu = f"{row['mfu']:.0%}" if row["mfu"] is not None else "n/a"
    left = duration((total_steps - row["step"]) * row["ms"] / 1000)
    parts = [
        f"step {row['step']}/{total_steps} {100 * row['step'] / total_steps:4.1f}%",
        f"loss {loss:.3f}",
        f"lr {row['learning_rate']:.1e}",
        f"|g| {row['grad_norm']:.2f}",
        f"{row['ms']:.0f} ms",
        f"{short(row['tokens_per_s'])} tok/s",
        f"{short(row['images_per_s'])} img/s",
        f"mfu {mfu}",
        f"{row['peak_bytes'] / 1e9:.1f} GB",
        f"eta {left}",
    ]
    return " | ".join(parts)


def sparkline(values: list[float], width: int = 60) -> str:
    """The values as one line of blocks, each the mean of an equal share of them."""
    width = min(width, len(values))
    means = [_mean(values[i * len(values) // width : (i + 1) * len(values) // width]) for i in range(width)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in means)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average that starts at the first value."""
    out: list[float] = []
    for value in values:
        out.append(keep * out[-1] + (1 - keep) * value if out else value)
    return out


# Picture of the curves ------------------------------------------------------------------------------------------------

_STYLE = """<style>
text{font:12px system-ui,sans-serif;fill:#57606a}.grid{stroke:#d0d7de;stroke-width:1}path{fill:none;stroke-width:1.6}
.loss{stroke:#0969da}.raw{stroke:#0969da;opacity:.25}.val_loss{stroke:#bf3989}.val_loss_shuffled{stroke:#bf8700}
@media(prefers-color-scheme:dark){text{fill:#8b949e}.grid{stroke:#30363d}.loss,.raw{stroke:#58a6ff}}</style>"""


def loss_svg(rows: list[dict]) -> str:
    """The curves of a run as SVG text: loss (raw and smoothed), validation, and validation with shuffled pictures."""
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    curves = {
        "raw": train,
        "loss": list(zip([step for step, _ in train], smooth([loss for _, loss in train]), strict=True)),
        "val_loss": [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
        "val_loss_shuffled": [
            (row["step"], row["val_loss_shuffled"]) for row in rows if row.get("val_loss_shuffled") is not None
        ],
    }
    values = [y for curve in curves.values() for _, y in curve]
    top, last = max(values), max(step for curve in curves.values() for step, _ in curve)

    def place(step: float, value: float) -> str:
        return f"{60 + 720 * step / last:.1f},{300 - 250 * value / (top or 1):.1f}"

    lines = [_STYLE]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = 300 - 250 * share
        lines.append(
            f'<path class="grid" d="M60,{y}H780"/><text x="52" y="{y + 4}" text-anchor="end">{top * share:.3g}</text>'
        )
    for stage in sorted({row["stage"] for row in rows}):
        first = min(row["step"] for row in rows if row["stage"] == stage)
        x = place(first - 1, 0).split(",")[0]
        lines.append(f'<path class="grid" d="M{x},50V300"/><text x="{x}" y="318">stage {stage}</text>')
    for name, curve in curves.items():
        if curve:
            lines.append(f'<path class="{name}" d="M{" L".join(place(*point) for point in curve)}"/>')
    legend = {"loss": "training loss", "val_loss": "validation", "val_loss_shuffled": "validation, other pictures"}
    for i, (name, title) in enumerate((n, t) for n, t in legend.items() if curves[n]):
        x = 60 + 200 * i
        lines.append(f'<path class="{name}" d="M{x},24H{x + 24}"/><text x="{x + 30}" y="28">{title}</text>')
    lines.append(f'<text x="780" y="318" text-anchor="end">step {last}</text>')
    body = "\n".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 330" role="img">\n{body}\n</svg>\n'


# Report ---------------------------------------------------------------------------------------------------------------


def write_report(directory: Path) -> None:
    """Write loss.svg and report.md of the run in `directory`, from its own files."""
    rows = read_metrics(directory)
    start = json.loads((directory / "run.json").read_text(encoding="utf-8"))["starts"][-1]
    (directory / "loss.svg").write_text(loss_svg(rows), encoding="utf-8")
    losses = [row["loss"] for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    sections = [
        f"# {directory.name}",
        f"Loss over {len(losses)} steps: `{sparkline(losses)}`\n\n![curves](loss.svg)",
        _subject(directory),
        _stage_table(rows),
        _cost(rows, start),
        _verdict(evaluations),
        _captions(evaluations, directory),
        _scores(directory),
        "## How it was made",
        f"    {start['command']}",
        f"{start['time']}, {start['device']}, {start['machine']}; commit {start['commit']}; "
        + ", ".join(f"{name} {version}" for name, version in start["versions"].items()),
        "| setting | from |\n|---|---|\n" + "\n".join(f"| {n} | {o} |" for n, o in start["settings_from"].items()),
        f"## Try it\n\n    python sample.py --model {directory / 'best_model'} --image x.jpg",
    ]
    (directory / "report.md").write_text("\n\n".join(s for s in sections if s) + "\n", encoding="utf-8")


def _stage_table(rows: list[dict]) -> str:
    lines = ["| stage | steps | loss, first 10 | loss, last 10 | validation | time |", "|---|---|---|---|---|---|"]
    for stage in sorted({row["stage"] for row in rows}):
        train = [row for row in rows if row["stage"] == stage and "loss" in row]
        losses = [row["loss"] for row in train]
        found = [row["val_loss"] for row in rows if row["stage"] == stage and "val_loss" in row]
        validation = f"{found[-1]:.4f}" if found else "-"
        seconds = duration(sum(row["ms"] for row in train) / 1000)
        first, last = _mean(losses[:10]), _mean(losses[-10:])
        lines.append(f"| {stage} | {len(train)} | {first:.4f} | {last:.4f} | {validation} | {seconds} |")
    return "\n".join(lines)


def _verdict(evaluations: list[dict]) -> str:
    """What the image probe says, in words."""
    probed = [row for row in evaluations if row["val_loss_shuffled"] is not None]
    if not probed:
        return ""
    true, other = probed[-1]["val_loss"], probed[-1]["val_loss_shuffled"]
    looks = "the model looks at the picture" if other > true * 1.02 else "the model hardly looks at the picture"
    return f"Validation loss {true:.4f} with the true pictures, {other:.4f} with those of other samples: {looks}."


def _scores(directory: Path) -> str:
    """What `mmllm evaluate` found of the run's models."""
    tables = []
    for path in sorted(directory.glob("evaluation/*/scores.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        tables.append(f"`{found['data']}`, answered by {found.get('checkpoint', found['model'])}:")
        for part in ("captions", "vqa", "answers"):
            rows = {name: scores[part] for name, scores in found["scores"].items() if part in scores}
            columns = [name for name, value in next(iter(rows.values()), {}).items() if isinstance(value, float)]
            lines = [[part, *columns], ["---"] * (1 + len(columns))]
            lines += [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in rows.items()]
            tables += ["\n".join(f"| {' | '.join(line)} |" for line in lines)] * bool(columns)
    return "\n\n".join(["## Scores", *tables]) if tables else ""


def _subject(directory: Path) -> str:
    """What was trained on what, as experiment.json has it."""
    path = directory / "experiment.json"
    if not path.exists():  # the rows of a run without its settings
        return ""
    settings = json.loads(path.read_text(encoding="utf-8"))
    model, data, training = settings["model"], settings["data"], settings["training"]
    source = f"`{model['pretrained']}`" if model["pretrained"] else f"`{model['clip']}` and `{model['qwen']}`"
    how = (
        " with adapters" * model["use_lora"]
        + " on int8 weights" * model["load_in_8bit"]
        + " on int4 weights" * model["load_in_4bit"]
    )
    stages = "; ".join(
        f"stage {number} trains {', '.join(stage['train'])} for {stage['epochs']} epochs"
        for number, stage in ((1, training["stage1"]), (2, training["stage2"]))
    )
    validation = f"`{data['val_data_path']}`" if data["val_data_path"] else "nothing"
    return f"From {source}{how}, on `{data['train_data_path']}`, validated on {validation}. {stages[0].upper()}{stages[1:]}."


def _cost(rows: list[dict], start: dict) -> str:
    """What the steps took: time, tokens, pictures, memory, and of which device."""
    train = [row for row in rows if "loss" in row]
    tokens, images = (sum(row[name] * row["ms"] / 1000 for row in train) for name in ("tokens_per_s", "images_per_s"))
    seconds, peak = sum(row["ms"] for row in train) / 1000, max(row["peak_bytes"] for row in train)
    return (
        f"Cost of the steps: {duration(seconds)} on {start['device']}, {short(tokens)} tokens, {short(images)} pictures, "
        f"{peak / 1e9:.1f} GB at most."
    )


def _captions(evaluations: list[dict], directory: Path) -> str:
    captions = evaluations[-1]["captions"] if evaluations else []
    if not captions:
        return ""
    lines = ["## What it says", "", "| picture | sample | asked | model | reference |", "|---|---|---|---|---|"]
    for caption in captions:
        cells = [
            caption[name].replace("|", "\\|").replace("\n", " ") for name in ("id", "prompt", "answer", "reference")
        ]
        image = caption["image"]
        is_there = image and Path(image).exists()  # not where only features were given
        picture = f'<img src="{escape(os.path.relpath(image, directory))}" width="112">' if is_there else ""
        lines.append("| " + " | ".join([picture, *cells]) + " |")
    return "\n".join(lines)
