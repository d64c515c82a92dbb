"""What predictions score, and the table on the console."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from mmllm.evaluation.captions import best_constant_caption, caption_rows, scores_of_sums
from mmllm.evaluation.clip_score import clip_scores
from mmllm.evaluation.evaluator import MultimodalEvaluator
from mmllm.evaluation.predictions import Predictions, write_predictions
from mmllm.evaluation.tasks import Task
from mmllm.evaluation.vqa import PEOPLE, is_answer, vqa_accuracy, vqa_accuracy_normalised

Rules = dict[str, Callable[[str, tuple[str, ...]], float]]  # name of a score: the score of an answer and its references
BY_PEOPLE: Rules = {"vqa_accuracy": vqa_accuracy, "vqa_accuracy_normalised": vqa_accuracy_normalised}
BY_REFERENCE: Rules = {"accuracy": is_answer, "exact_match": lambda text, references: text in references}


def score_runs(
    tasks: list[Task],
    runs: dict[str, Predictions],
    out: Path,
    *,
    evaluator: MultimodalEvaluator,
    has_constant: bool,
    clip: str | None = None,
) -> dict[str, dict]:
    """The scores of each run, of which the first has the true images; writes its predictions to `out`.

    METEOR, SPICE and intervals are for the true images alone. `clip` names a CLIP for CLIPScore, always of a caption and
    the true image.
    """
    plain = MultimodalEvaluator(meteor=False)
    scores = {}
    for name, predictions in runs.items():
        is_first = not scores
        write_predictions(out, tasks, predictions, suffix="" if is_first else f"_{name.split()[0]}")
        scores[name] = score(tasks, predictions, evaluator if is_first else plain)
        if is_first:
            for part, found in score_intervals(tasks, predictions).items():
                scores[name][part]["interval"] = found
    if has_constant:
        runs = runs | {"best constant": constant_predictions(tasks)}
        scores["best constant"] = score(tasks, runs["best constant"], plain)
    for name, predictions in runs.items() if clip else ():
        captioned = [(task, text) for task, text in parts(tasks, predictions).get("captions", []) if task.images]
        found = list(clip_scores(clip, [task.images[0] for task, _ in captioned], [text for _, text in captioned]))
        if found:
            scores[name]["captions"]["clip_score"] = sum(found) / len(found)
    return scores


def parts(tasks: list[Task], predictions: Predictions) -> dict[str, list[tuple[Task, str]]]:
    """The captions, the questions that several people answered ("vqa"), and the others ("answers"), as far as there are
    any. A task without prediction or references is in none."""
    found = defaultdict(list)
    for task, text in zip(tasks, predictions, strict=True):
        if task.references and text is not None:
            is_vqa = len(task.references) >= PEOPLE
            found["captions" if task.is_caption else "vqa" if is_vqa else "answers"].append((task, text))
    return {part: found[part] for part in ("captions", "vqa", "answers") if part in found}


def rules_of(part: str) -> Rules:
    return BY_PEOPLE if part == "vqa" else BY_REFERENCE


def score(tasks: list[Task], predictions: Predictions, evaluator: MultimodalEvaluator) -> dict[str, dict]:
    """The scores of each of `parts`, with its `count`, of questions also `by_kind`."""
    scores = {}
    for part, pairs in parts(tasks, predictions).items():
        if part == "captions":
            measured = evaluator.evaluate_captioning([text for _, text in pairs], [t.references for t, _ in pairs])
            scores[part] = {"count": len(pairs)} | measured
        else:
            scores[part] = mean_by_kind(pairs, rules_of(part))
    return scores


def score_intervals(tasks: list[Task], predictions: Predictions) -> dict[str, dict[str, list[float]]]:
    """The 95 % intervals of the scores of each of `parts`."""
    import numpy as np

    from mmllm.evaluation.bootstrap import intervals

    found = {}
    for part, pairs in parts(tasks, predictions).items():
        if part == "captions":
            rows, measure = caption_rows([text for _, text in pairs], [t.references for t, _ in pairs]), scores_of_sums
        else:
            rules = rules_of(part)
            rows = np.array([[*(rule(text, task.references) for rule in rules.values()), 1] for task, text in pairs])

            def measure(sums: np.ndarray, names: Rules = rules) -> dict[str, float]:
                return dict(zip(names, sums[:-1] / sums[-1], strict=True))

        found[part] = intervals(rows, [task.images or task.id for task, _ in pairs], measure)
    return found


def mean_by_kind(pairs: list[tuple[Task, str]], rules: Rules) -> dict:
    """The mean of each rule over all pairs, and over those of each kind of question where kinds are given."""
    kinds = sorted({task.kind for task, _ in pairs} - {""})
    by_kind = {kind: means([pair for pair in pairs if pair[0].kind == kind], rules) for kind in kinds}
    return means(pairs, rules) | ({"by_kind": by_kind} if kinds else {})


def means(pairs: list[tuple[Task, str]], rules: Rules) -> dict:
    return {"count": len(pairs)} | {
        name: sum(rule(text, task.references) for task, text in pairs) / len(pairs) for name, rule in rules.items()
    }


def constant_predictions(tasks: list[Task]) -> list[str]:
    """The best that needs no image: one caption for all, and the most common answer to each kind of question."""
    captions = [task.references for task in tasks if task.is_caption and task.references]
    caption = best_constant_caption(captions) if captions else ""
    answers = defaultdict(Counter)
    for task in tasks:
        answers[task.kind].update(task.references if not task.is_caption else ())
    common = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items() if counts}
    return [caption if task.is_caption else common.get(task.kind, "") for task in tasks]


def table(rows: dict[str, dict]) -> list[str]:
    """The lines of the scores: a block for the captions, and one for each kind of scoring of answers."""
    lines = []
    for part in ("captions", "vqa", "answers"):
        found = {name: with_kinds(scores[part]) for name, scores in rows.items() if part in scores}
        if not found:
            continue
        first = next(iter(found.values()))
        columns = [column for column in first if column != "count"]
        cells = [[f"{part} ({first['count']})", *columns]]
        for name, values in found.items():
            cells.append([name, *(f"{values[column]:.4f}" if column in values else "-" for column in columns)])
            if bounds := rows[name][part].get("interval"):
                cells.append(["  95 % of resampled sets", *(between(bounds.get(column)) for column in columns)])
        lines += ["", *aligned(cells)]
        if part == "captions" and first["count"] == 1:
            lines.append("CIDEr of a single image is 0 by its definition")
    return [*lines, ""] if lines else ["no sample has a reference: nothing to score", ""]


def between(bounds: list[float] | None) -> str:
    return f"{bounds[0]:.3f}-{bounds[1]:.3f}" if bounds else ""


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return [
        row[0].ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)) for row in rows
    ]


def with_kinds(scores: dict) -> dict[str, float]:
    """The scores of a part, with a column for each kind of question."""
    accuracy = "accuracy" if "accuracy" in scores else "vqa_accuracy"
    kinds = {kind: values[accuracy] for kind, values in scores.get("by_kind", {}).items()}
    return {name: value for name, value in scores.items() if name not in ("by_kind", "interval")} | kinds
