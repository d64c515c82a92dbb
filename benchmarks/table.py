"""The tables of docs/benchmarks.md, from the rows in benchmarks/.

`python -m benchmarks table` writes them between two markers of the page, and a test compares the page with the rows.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import caption as bench_caption
from benchmarks import generate as bench_generate
from benchmarks import load as bench_load
from benchmarks import train as bench_train
from benchmarks.rows import HISTORY, WORSE, goal_lines, measured, origin, read_rows
from mmllm.reporting.report import markdown_table

GOALS = bench_train.GOALS + bench_generate.GOALS + bench_caption.GOALS + bench_load.GOALS


def tables(folder: Path) -> str:
    """All tables for which there are rows, each with where and how it was measured."""
    parts, history = [], read_rows(folder, HISTORY)
    for kind, title, make in KINDS:
        rows = read_rows(folder, kind)
        for device in sorted({row["device"] for row in rows}):
            mine = [row for row in rows if row["device"] == device]
            parts.append(f"### {title}, {'GPU' if device == 'cuda' else 'CPU'}\n\n{make(mine)}\n\n{origin(mine)}.")
            if lines := goal_lines(GOALS, kind, mine, device, history):
                parts.append(markdown_table(("goal", "measured", "wanted", "reached"), lines, numbers=True))
    lines = [
        (
            goal.text + " (GPU)" * (goal.device == "cuda"),
            ", ".join(f"{run['value']:.3g} ({run['commit'][:7]})" for run in measured(goal, history)[-6:]),
        )
        for goal in GOALS
        if measured(goal, history)
    ]
    if lines:
        parts.append("### Ratios, the oldest first\n\n" + markdown_table(("ratio", "measured at"), lines))
    return "\n\n".join(parts) or "Not measured yet."


def regressions(folder: Path) -> list[str]:
    """One line for each goal whose ratio has become worse in two runs."""
    rows, history = (
        {kind: read_rows(folder, kind) for kind in {goal.kind for goal in GOALS}},
        read_rows(folder, HISTORY),
    )
    lines = [goal.line(rows[goal.kind], history) for goal in GOALS]
    return [f"{text}: {value}, {reached.partition('; ')[2]}" for text, value, _, reached in lines if WORSE in reached]


def table(columns: dict[str, Callable[[dict], str]], rows: list[dict]) -> str:
    return markdown_table(tuple(columns), [[cell(row) for cell in columns.values()] for row in rows], numbers=True)


def cell(field: str, form: str, scale: float = 1.0, unit: str = "") -> Callable[[dict], str]:
    """What a column shows of a row: a number with its unit, or a dash."""

    def text(row: dict) -> str:
        value = row.get(field)
        return "-" if value is None else format(value if scale == 1 else value * scale, form) + unit

    return text


PEAK = cell("peak_bytes", ".2f", 1e-9, " GB")
TRAIN = {
    "step": lambda row: f"{row['case']}, {row['rows']} rows",
    "by": lambda row: row["contestant"],
    "s": cell("seconds", ".3g"),
    "tokens/s": cell("tokens_per_s", ",.0f"),
    "TFLOP/s": cell("tflops_per_s", ".3g"),
    "of the peak": cell("mfu", ".0%"),
    "peak memory": cell("peak_bytes", ".1f", 1e-9, " GB"),
}
MEMORY = {
    "step": TRAIN["step"],
    "predicted": cell("predicted_bytes", ".2f", 1e-9, " GB"),
    "measured": PEAK,
    "off by": cell("error", "+.0%"),
}
REHEARSE = {
    "configuration, changed settings": lambda row: " ".join(f"`{part}`" for part in (row["case"], *row["settings"])),
    "samples": cell("samples", "d"),
    "steps": cell("steps", "d"),
    "in all": cell("total_s", ".0f", 1.0, " s"),
    "tokens/s": cell("tokens_per_s", ".0f"),
    "peak memory": PEAK,
}
CAPTION = {
    "precision": lambda row: row["case"],
    "by": lambda row: row["contestant"] + (f", {row['rows']} at once" if row["rows"] > 1 else ""),
    "images": cell("images", "d"),
    "tokens an image": cell("new_tokens", "d"),
    "images/minute": cell("images_per_minute", ".0f"),
}


def generate_table(rows: list[dict]) -> str:
    """One line a contestant: what loading took, the first token, and the rate at each batch."""
    found = {(row["contestant"], row["case"]): row for row in rows}
    answers = [row for row in rows if row["case"].startswith("batch")]

    def rate(count: int) -> Callable[[dict], str]:
        case = bench_generate.batch(count)
        return lambda single: cell("tokens_per_s", ".3g")(found.get((single["contestant"], case), {}))

    columns = {
        "by": lambda row: row["contestant"],
        "load": cell("load_s", ".2f", 1.0, " s"),
        "first token": cell("first_token_s", ".3f", 1.0, " s"),
        **{f"tokens/s, {count} at once": rate(count) for count in sorted({int(row["rows"]) for row in answers})},
        "of the bandwidth": cell("bandwidth_share", ".0%"),
        "peak memory": PEAK,
    }
    names = dict.fromkeys(row["contestant"] for row in answers)
    return table(columns, [{"contestant": name} | found.get((name, bench_generate.B1), {}) for name in names])


KINDS = (
    ("train", "One training step", partial(table, TRAIN)),
    ("generate", "Answers", generate_table),
    ("caption", "Captions for a folder", partial(table, CAPTION)),
    ("memory", "Memory, as --dry-run predicts it", partial(table, MEMORY)),
    ("rehearse", "Whole runs on random weights", partial(table, REHEARSE)),
)
