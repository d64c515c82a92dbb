"""README's tables of measurements, made from the rows under benchmarks/.

`python -m mmllm.bench table` puts them between two markers of README.md; a test holds README to the rows.
"""

from pathlib import Path

from mmllm import bench_train
from mmllm.bench_rows import amount, goal_lines, origin, read_rows, table

GOALS = bench_train.GOALS


def tables(folder: Path) -> str:
    """All tables for which there are rows, each with where and how it was measured."""
    parts = []
    for kind, title, make in (("train", "One training step", train_table),):
        rows = read_rows(folder, kind)
        for device in sorted({row["device"] for row in rows}):
            mine = [row for row in rows if row["device"] == device]
            parts.append(f"#### {title}, {'GPU' if device == 'cuda' else 'CPU'}\n\n{make(mine)}\n\n{origin(mine)}.")
            if lines := goal_lines(GOALS, kind, mine, device):
                parts.append(table(("goal", "measured", "wanted", "reached"), lines))
    return "\n\n".join(parts) or "Not measured yet."


def train_table(rows: list[dict]) -> str:
    head = ("step", "by", "s", "tokens/s", "TFLOP/s", "of the peak", "peak memory")
    lines = [
        (
            f"{row['case']}, {row['rows']} rows",
            row["contestant"],
            amount(row["seconds"], ".3g"),
            amount(row["tokens_per_s"], ",.0f"),
            amount(row["tflops_per_s"], ".3g"),
            amount(row["mfu"], ".0%"),
            amount(row["peak_bytes"], ".1f", 1e-9) + " GB",
        )
        for row in rows
    ]
    return table(head, lines)
