"""What predictions score, and the table on the console."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from mmllm.evaluation.bootstrap import intervals
from mmllm.evaluation.captions import best_constant_caption, caption_rows, scores_of_sums
from mmllm.evaluation.clip_score import clip_scores
from mmllm.evaluation.evaluator import MultimodalEvaluator
from mmllm.evaluation.predictions import Predictions
from mmllm.evaluation.tasks import Task
from mmllm.evaluation.vqa import PEOPLE, is_answer, vqa_accuracy, vqa_accuracy_normalised

RULES = {  # by part: name of a score, and the score of an answer by its references
    "vqa": {"vqa_accuracy": vqa_accuracy, "vqa_accuracy_normalised": vqa_accuracy_normalised},
    "answers": {"accuracy": is_answer, "exact_match": lambda text, references: text in references},
}


@dataclass(frozen=True)
class Part:
    """Answers that are scored alike: the captions, the questions that several people answered ("vqa"), or the others
    ("answers"). `scores_of` takes the sum of `rows` (answers, numbers); `values` score each answer alone."""

    tasks: list[Task]
    texts: list[str]
    rows: np.ndarray
    values: np.ndarray
    scores_of: Callable[[np.ndarray], dict[str, float]]

    def scores(self, kind: str = "") -> dict:
        """The scores, with their `count`, of all answers or of those to one kind of question."""
        chosen = [not kind or task.kind == kind for task in self.tasks]
        return {"count": sum(chosen)} | self.scores_of(self.rows[chosen].sum(axis=0))


def measure(tasks: list[Task], predictions: Predictions) -> dict[str, Part]:
    """The parts by name, as far as there are any. A task without prediction or references is in none."""
    found = {name: ([], []) for name in ("captions", "vqa", "answers")}
    for task, text in zip(tasks, predictions, strict=True):
        if task.references and text is not None:
            is_vqa = len(task.references) >= PEOPLE
            part = found["captions" if task.is_caption else "vqa" if is_vqa else "answers"]
            part[0].append(task)
            part[1].append(text)
    return {name: measure_part(name, *part) for name, part in found.items() if part[0]}


def measure_part(name: str, tasks: list[Task], texts: list[str]) -> Part:
    references = [task.references for task in tasks]
    if name == "captions":
        rows = caption_rows(texts, references)
        return Part(tasks, texts, rows, rows[:, -2], scores_of_sums)  # the value of each is its CIDEr
    rules = RULES[name]
    rows = np.array([[*(rule(*pair) for rule in rules.values()), 1.0] for pair in zip(texts, references, strict=True)])

    def means(sums: np.ndarray) -> dict[str, float]:
        return dict(zip(rules, (sums[:-1] / sums[-1]).tolist(), strict=True))

    return Part(tasks, texts, rows, rows[:, 0], means)


def score_runs(
    runs: dict[str, dict[str, Part]], evaluator: MultimodalEvaluator, clip: str | None = None, device: str = "auto"
) -> dict[str, dict]:
    """The scores of each part of each run, of questions also `by_kind`. The first run has the true images: METEOR, SPICE
    and intervals are for it alone. `clip` names a CLIP for CLIPScore, always of a caption and the true image, on `device`."""
    scores: dict[str, dict] = {}
    for run, parts in runs.items():
        is_first, scores[run] = not scores, {}
        for name, part in parts.items():
            found = scores[run][name] = part.scores()
            kinds = sorted({task.kind for task in part.tasks} - {""})
            if kinds and name != "captions":
                found["by_kind"] = {kind: part.scores(kind) for kind in kinds}
            if is_first and name == "captions":
                found |= evaluator.java_scores(part.texts, [task.references for task in part.tasks])
            if is_first:
                groups = [task.images or task.id for task in part.tasks]
                found["interval"] = intervals(part.rows, groups, part.scores_of)
            captioned = [
                (task.images[0], text) for task, text in zip(part.tasks, part.texts, strict=True) if task.images
            ]
            if clip and captioned and name == "captions":
                found["clip_score"] = fmean(clip_scores(clip, *map(list, zip(*captioned, strict=True)), device))
    return scores


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
        found = {name: with_kinds(part, scores[part]) for name, scores in rows.items() if part in scores}
        if not found:
            continue
        first = next(iter(found.values()))
        columns = [column for column in first if column != "count"]
        cells = [[f"{part} ({first['count']})", *columns]]
        for name, values in found.items():
            cells.append([name, *(f"{values[column]:.4f}" if column in values else "-" for column in columns)])
            if bounds := rows[name][part].get("interval"):
                within = ("{:.3f}-{:.3f}".format(*bounds[column]) if column in bounds else "" for column in columns)
                cells.append(["  95 % of resampled sets", *within])
        widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
        lines.append("")
        for name, *numbers in cells:
            lines.append(name.ljust(widths[0]) + "".join(map(str.rjust, numbers, widths[1:])))
        if part == "captions" and first["count"] == 1:
            lines.append("CIDEr of a single image is 0 by its definition")
    return [*lines, ""] if lines else ["no sample has a reference: nothing to score", ""]


def with_kinds(part: str, scores: dict) -> dict[str, float]:
    """The scores of a part, with a column for each kind of question."""
    kinds = {kind: values[next(iter(RULES[part]))] for kind, values in scores.get("by_kind", {}).items()}
    return {name: value for name, value in scores.items() if name not in ("by_kind", "interval")} | kinds
