"""The tables of docs/benchmarks.md, from the rows in benchmarks/.

`python -m benchmarks table` writes them between two markers of the page, and a test compares the page with the rows.
"""

from pathlib import Path

from benchmarks import caption as bench_caption
from benchmarks import generate as bench_generate
from benchmarks import load as bench_load
from benchmarks import train as bench_train
from benchmarks.rows import amount, goal_lines, origin, read_rows
from mmllm.reporting.report import markdown_table

GOALS = bench_train.GOALS + bench_generate.GOALS + bench_caption.GOALS + bench_load.GOALS


def tables(folder: Path) -> str:
    """All tables for which there are rows, each with where and how it was measured."""
    parts = []
    for kind, title, make in KINDS:
        rows = read_rows(folder, kind)
        for device in sorted({row["device"] for row in rows}):
            mine = [row for row in rows if row["device"] == device]
            parts.append(f"### {title}, {'GPU' if device == 'cuda' else 'CPU'}\n\n{make(mine)}\n\n{origin(mine)}.")
            if lines := goal_lines(GOALS, kind, mine, device):
                parts.append(markdown_table(("goal", "measured", "wanted", "reached"), lines, numbers=True))
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
    return markdown_table(head, lines, numbers=True)


def generate_table(rows: list[dict]) -> str:
    """One line a contestant: what loading took, the first token, and the rate at each batch."""
    found = {(row["contestant"], row["case"]): row for row in rows}
    batches = sorted({int(row["rows"]) for row in rows if row["case"].startswith("batch")})
    contestants = list(dict.fromkeys(row["contestant"] for row in rows if row["case"].startswith("batch")))
    head = (
        "by",
        "load",
        "first token",
        *(f"tokens/s, {n} at once" for n in batches),
        "of the bandwidth",
        "peak memory",
    )
    lines = []
    for name in contestants:
        single = found.get((name, bench_generate.B1), {})
        rates = [found.get((name, bench_generate.batch(n)), {}).get("tokens_per_s") for n in batches]
        lines.append(
            (
                name,
                amount(single.get("load_s"), ".2f") + " s",
                amount(single.get("first_token_s"), ".3f") + " s",
                *(amount(rate, ".3g") for rate in rates),
                amount(single.get("bandwidth_share"), ".0%"),
                amount(single.get("peak_bytes"), ".2f", 1e-9) + " GB",
            )
        )
    return markdown_table(head, lines, numbers=True)


def memory_table(rows: list[dict]) -> str:
    head = ("step", "predicted", "measured", "off by")
    lines = [
        (
            f"{row['case']}, {row['rows']} rows",
            amount(row["predicted_bytes"], ".2f", 1e-9) + " GB",
            amount(row["peak_bytes"], ".2f", 1e-9) + " GB",
            amount(row["error"], "+.0%"),
        )
        for row in rows
    ]
    return markdown_table(head, lines, numbers=True)


def rehearse_table(rows: list[dict]) -> str:
    head = ("configuration, changed settings", "samples", "steps", "in all", "tokens/s", "peak memory")
    lines = [
        (
            " ".join([f"`{row['case']}`", *(f"`{setting}`" for setting in row["settings"])]),
            str(row["samples"]),
            str(row["steps"]),
            amount(row["total_s"], ".0f") + " s",
            amount(row["tokens_per_s"], ".0f"),
            amount(row["peak_bytes"], ".2f", 1e-9) + " GB",
        )
        for row in rows
    ]
    return markdown_table(head, lines, numbers=True)


def caption_table(rows: list[dict]) -> str:
    head = ("precision", "by", "images", "tokens an image", "images/minute")
    lines = [
        (
            row["case"],
            f"{row['contestant']}, {row['rows']} at once" if row["rows"] > 1 else row["contestant"],
            str(row["images"]),
            str(row["new_tokens"]),
            amount(row["images_per_minute"], ".0f"),
        )
        for row in rows
    ]
    return markdown_table(head, lines, numbers=True)


KINDS = (
    ("train", "One training step", train_table),
    ("generate", "Answers", generate_table),
    ("caption", "Captions for a folder", caption_table),
    ("memory", "Memory, as --dry-run predicts it", memory_table),
    ("rehearse", "Whole runs on random weights", rehearse_table),
)
