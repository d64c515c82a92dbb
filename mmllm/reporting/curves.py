"""Loss curves as PNG or SVG, by the suffix of the file: of one run, or of several laid over each other.

matplotlib is imported when a figure is drawn (0.4 s), as an object without pyplot: no window system, no global state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.reporting.metrics import loss_rows, smooth, validation_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0969da", "#bf3989", "#1a7f37", "#bf8700")  # told apart by most colour-blind readers, and in grey
GREY = "#57606a"
SHUFFLED = "val_loss_shuffled"


def draw_run(rows: list[dict], path: Path) -> None:
    """Loss of a run as measured and smoothed, validation, and validation with the images of other samples."""
    train, validation = loss_rows(rows), validation_rows(rows)
    shuffled = [row for row in validation if row.get(SHUFFLED) is not None]
    steps, losses = _points(train, "loss")
    with _axes(path, f"Loss of {path.resolve().parent.name}") as axes:
        axes.plot(steps, smooth(losses), color=COLORS[0], label="training")
        if validation:
            axes.plot(*_points(validation, "val_loss"), color=COLORS[1], marker="o", label="validation")
        if shuffled:
            axes.plot(*_points(shuffled, SHUFFLED), color=COLORS[3], marker="s", label="validation, other images")
        _fit_y(axes)
        axes.plot(steps, losses, color=COLORS[0], alpha=0.25, linewidth=0.8, zorder=1)  # its noise may leave the frame
        for stage in sorted({row["stage"] for row in rows}):
            first = min(row["step"] for row in rows if row["stage"] == stage)
            axes.axvline(first, color=GREY, linewidth=0.8, linestyle=":")
            axes.annotate(f" stage {stage}", (first, 1), xycoords=("data", "axes fraction"), va="top", color=GREY)


def draw_comparison(runs: dict[str, list[dict]], path: Path) -> None:
    """Smoothed training loss of each run as a line, its validation loss dashed in the same colour."""
    with _axes(path, f"Loss of {len(runs)} runs") as axes:
        for (name, rows), color in zip(runs.items(), COLORS, strict=False):
            steps, losses = _points(loss_rows(rows), "loss")
            axes.plot(steps, smooth(losses), color=color, label=name)
            axes.plot(*_points(validation_rows(rows), "val_loss"), color=color, linestyle="--", marker="o")
        axes.plot([], [], color=GREY, linestyle="--", marker="o", label="validation")
        _fit_y(axes)


def _points(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row[name] for row in rows]


def _fit_y(axes: "Axes") -> None:
    """Show what is drawn so far. Over more than a factor of ten in logarithms: the end, where runs differ, is else flat."""
    from matplotlib.ticker import LogLocator

    low, high = axes.dataLim.intervaly
    if high > 10 * low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(low / 1.5, high * 1.5)
    else:
        axes.set_ylim(0, 1.05 * high if high > 0 else 1)


@contextmanager
def _axes(path: Path, title: str) -> Iterator["Axes"]:
    """Axes to draw into; the figure is 800 pixels wide and goes to `path` at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 11, "lines.linewidth": 1.8, "lines.markersize": 4, "svg.fonttype": "none"}  # text stays text
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
        axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss, nats per token", title=title)
        axes.grid(color="#d0d7de", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path)
