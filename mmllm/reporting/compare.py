"""Two to four runs in one table and one figure: `mmllm compare RUN RUN`.

The settings that differ stand first, read from the files of the runs: they are rarely only those one remembers.
"""

import json
from pathlib import Path

from mmllm.errors import UserError
from mmllm.reporting.curves import COLORS, draw_comparison
from mmllm.reporting.metrics import loss_rows, read_metrics, read_settings, smooth, training_rows, validation_rows
from mmllm.runtime.console import duration, short


def compare(directories: list[Path], figure: Path) -> list[str]:
    """The lines of the comparison; the curves go to `figure`, a .png or .svg file.

    UserError for a directory without training steps, and for a file that cannot be drawn.
    """
    if not 2 <= len(directories) <= len(COLORS):
        raise UserError(f"{len(directories)} runs to compare; name two to {len(COLORS)} directories")
    runs = {str(directory): read_metrics(directory) for directory in directories}
    for name, rows in runs.items():
        if not training_rows(rows):
            raise UserError(f"{name}: no metrics.jsonl with a step in it; name the directory of a run, or such a file")
    try:
        draw_comparison(runs, figure)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise UserError(f"{figure}: cannot be written ({error}); name a .png or .svg file with --out") from error
    return [*differences(directories), *_table(runs), f"curves: {figure}"]


def differences(directories: list[Path]) -> list[str]:
    """A line for each setting that is not the same in all runs; none where a run did not keep its settings."""
    settings = [read_settings(directory) for directory in directories]
    if not all(settings):
        return []
    names = sorted({name for one in settings for name in one} - {"experiment_name", "output_dir"})
    values = {name: [json.dumps(one.get(name)) for one in settings] for name in names}
    return [f"{name}: {' | '.join(found)}" for name, found in values.items() if len(set(found)) > 1]


def _table(runs: dict[str, list[dict]]) -> list[str]:
    """A line a run: steps, last smoothed loss, best validation loss, time, speed, peak memory."""
    width = max(map(len, runs))
    lines = [f"{'run':{width}}  steps    loss  validation      time   tokens/s  memory"]
    for name, rows in runs.items():
        train = training_rows(rows)
        seconds = sum(row["ms"] for row in train) / 1000
        tokens = sum(row["tokens_per_s"] * row["ms"] / 1000 for row in train)
        validation = [row["val_loss"] for row in validation_rows(rows)]
        losses = smooth([row["loss"] for row in loss_rows(rows)])
        lines.append(
            f"{name:{width}}  {train[-1]['step']:5}  {f'{losses[-1]:.3f}' if losses else '-':>6}  "
            f"{f'{min(validation):.4f}' if validation else '-':>10}  {duration(seconds):>8}  "
            f"{short(tokens / seconds):>9}  {max(row['peak_bytes'] for row in train) / 1e9:.1f} GB"
        )
    return lines
