"""report.md of the recipe: its scores beside the targets and what was published for like systems, and what it cost."""

from itertools import product
from pathlib import Path

from mmllm.reporting.metrics import read_metrics, training_rows
from mmllm.reporting.report import markdown_table
from mmllm.runtime.console import duration
from mmllm.runtime.files import read_json

MODELS = ("mix", "reward")  # those that are evaluated
# name of the table: the part of scores.json, what its numbers are multiplied by, columns, the target, and published rows
TABLES = {
    "coco": (
        "captions",
        {"BLEU-4": "bleu_4", "CIDEr": "cider"},
        {"target": (39.0, 130.0)},
        {
            "ClipCap (arXiv:2111.09734)": (32.2, 108.4),
            "SmallCap (arXiv:2209.15323)": (37.0, 119.7),
            "GIT-base (arXiv:2205.14100)": (None, 131.4),
            "LightCap with a CIDEr reward (arXiv:2212.08985)": (None, 136.6),
        },
    ),
    "vqav2": (
        "vqa",
        {"accuracy": "vqa_accuracy"},
        {"target": (70.0,)},
        {
            "GIT-base, test-dev (arXiv:2205.14100)": (72.7,),
            "TinyLLaVA 0.5B, test-dev (github.com/TinyLLaVA/TinyLLaVA_Factory)": (75.3,),
        },
    ),
}
NOTES = {
    "coco": "Karpathy's test split, 5,000 images, as in the published rows.",
    "vqav2": "Questions about Karpathy's test images. The published rows are of test-dev, whose answers only the server has: "
    "send the answers.json of `mmllm evaluate --data data/vqav2-test/test.jsonl` there for a number to compare.",
}


def write_report(out: Path) -> Path:
    sections = ["# The public recipe"]
    for name in TABLES:
        rows = {
            f"{model}: {row}": scores
            for model in MODELS
            for row, scores in read_json(out / model / "evaluation" / name / "scores.json")["scores"].items()
        }
        sections += [f"## {name}", scores_table(name, rows), NOTES[name]]
    sections += ["## Cost", cost_table(out)]
    path = out / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def scores_table(name: str, scores: dict[str, dict]) -> str:
    """Our rows, those without the image's help among them, then the target and the published ones; all in percent."""
    part, columns, target, published = TABLES[name]
    rows = [
        (row, *(percent(found[part][key], found[part].get("interval", {}).get(key)) for key in columns.values()))
        for row, found in scores.items()
    ]
    for row, values in (target | published).items():
        rows.append((row, *("-" if value is None else f"{value:.1f}" for value in values)))
    return markdown_table((f"{name} test", *columns), rows, numbers=True)


def percent(score: float, interval: list[float] | None) -> str:
    within = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    return f"{100 * score:.1f}{within}"


def cost_table(out: Path) -> str:
    """Steps, tokens and time of each training, from its metrics.jsonl, and the time of each evaluation."""
    rows = []
    for name in ("align", *MODELS):
        steps = training_rows(read_metrics(out / name))
        seconds = sum(row["ms"] for row in steps) / 1000
        tokens = sum(row["tokens_per_s"] * row["ms"] / 1000 for row in steps)
        use = [row["mfu"] for row in steps if row.get("mfu")]
        of_peak = f"{sum(use) / len(use):.0%}" if use else "-"
        rows.append((name, str(len(steps)), f"{tokens / 1e6:.1f} M", duration(seconds), of_peak))
    for model, name in product(MODELS, TABLES):
        found = read_json(out / model / "evaluation" / name / "scores.json")
        rows.append((f"evaluation: {model}, {name}", "-", "-", duration(found["seconds"]), "-"))
    return markdown_table(("what", "steps", "tokens", "time", "of the peak"), rows, numbers=True)
