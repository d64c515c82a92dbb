"""Two runs in one picture and one table: `mmllm compare RUN RUN`.

The surprising fact: what two runs differ in is mostly not what their owner remembers. So the settings that differ stand
above the curves, read from the files of the runs. No torch here. Next: log.py.
"""

import json
from html import escape
from pathlib import Path

from mmllm.errors import UserError
from mmllm.reporting.log import read_metrics, smooth
from mmllm.runtime.console import duration, short

COLOURS = ("#0969da", "#bf3989", "#1a7f37", "#bf8700")  # of the runs in their order
STYLE = """<style>text{font:12px system-ui,sans-serif;fill:#57606a}.grid{stroke:#d0d7de;stroke-width:1}path{fill:none;
stroke-width:1.6}.validation{stroke-dasharray:5 3}@media(prefers-color-scheme:dark){text{fill:#8b949e}.grid{stroke:#30363d}}
</style>"""


def compare(directories: list[Path], picture: Path) -> list[str]:
    """The lines of the comparison; the curves go to `picture`. UserError for what is no run, or has no step yet."""
    if not 2 <= len(directories) <= len(COLOURS):
        raise UserError(f"{len(directories)} runs to compare; name two to {len(COLOURS)} directories")
    runs = {str(directory): steps_of(directory) for directory in directories}
    picture.write_text(overlay_svg(runs), encoding="utf-8")
    return [*differences(directories), *table(runs), f"curves: {picture}"]


def steps_of(directory: Path) -> list[dict]:
    rows = read_metrics(directory)
    if not any("loss" in row for row in rows):
        raise UserError(f"{directory}: no metrics.jsonl with a step in it; name the directory of a run")
    return rows


def differences(directories: list[Path]) -> list[str]:
    """One line for each setting that is not the same in all runs, where they have kept theirs."""
    files = [directory / "experiment.json" for directory in directories]
    if not all(file.exists() for file in files):
        return []
    settings = [flat(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    names = sorted({name for one in settings for name in one} - {"experiment_name", "output_dir"})
    return [
        f"{name}: " + " | ".join(json.dumps(one.get(name)) for one in settings)
        for name in names
        if len({json.dumps(one.get(name)) for one in settings}) > 1
    ]


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def table(runs: dict[str, list[dict]]) -> list[str]:
    """A line a run: steps, smoothed last loss, best validation, time, speed, memory."""
    width = max(map(len, runs))
    lines = [f"{'run':{width}}  steps    loss  validation      time   tokens/s  memory"]
    for name, rows in runs.items():
        train = [row for row in rows if "loss" in row]
        seconds = sum(row["ms"] for row in train) / 1000
        tokens = sum(row["tokens_per_s"] * row["ms"] / 1000 for row in train)
        found = [row["val_loss"] for row in rows if "val_loss" in row]
        lines.append(
            f"{name:{width}}  {len(train):5}  {smooth([row['loss'] for row in train])[-1]:6.3f}  "
            f"{f'{min(found):.4f}' if found else '-':>10}  {duration(seconds):>8}  {short(tokens / seconds):>9}  "
            f"{max(row['peak_bytes'] for row in train) / 1e9:.1f} GB"
        )
    return lines


def overlay_svg(runs: dict[str, list[dict]]) -> str:
    """Smoothed training losses as lines, validation dashed, one colour a run."""
    curves = {name: (losses(rows), validations(rows)) for name, rows in runs.items()}
    points = [point for pair in curves.values() for curve in pair for point in curve]
    top, last = max(y for _, y in points), max(x for x, _ in points)

    def path(curve: list[tuple[int, float]]) -> str:
        return "M" + " L".join(f"{60 + 720 * x / last:.1f},{300 - 250 * y / (top or 1):.1f}" for x, y in curve)

    lines = [STYLE]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = 300 - 250 * share
        lines.append(
            f'<path class="grid" d="M60,{y}H780"/><text x="52" y="{y + 4}" text-anchor="end">{top * share:.3g}</text>'
        )
    for i, ((name, (train, validation)), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        lines.append(f'<path stroke="{colour}" d="{path(train)}"/>')
        if validation:
            lines.append(f'<path class="validation" stroke="{colour}" d="{path(validation)}"/>')
        x = 60 + 180 * i
        lines.append(f'<path stroke="{colour}" d="M{x},24H{x + 24}"/><text x="{x + 30}" y="28">{escape(name)}</text>')
    lines.append(f'<text x="780" y="318" text-anchor="end">step {last}; dashed: validation</text>')
    body = "\n".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 330" role="img">\n{body}\n</svg>\n'


def losses(rows: list[dict]) -> list[tuple[int, float]]:
    train = [row for row in rows if "loss" in row]
    return list(zip([row["step"] for row in train], smooth([row["loss"] for row in train]), strict=True))


def validations(rows: list[dict]) -> list[tuple[int, float]]:
    return [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
