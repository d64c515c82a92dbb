"""An evaluation: what predictions score, the result files of COCO and VQAv2, and the table on the console."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mmllm.errors import UserError
from mmllm.evaluation.captions import best_constant_caption
from mmllm.evaluation.evaluator import MultimodalEvaluator
from mmllm.evaluation.tasks import Task, predict, with_other_images
from mmllm.evaluation.vqa import PEOPLE, is_answer, vqa_accuracy, vqa_accuracy_normalised
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import GenerationConfig
from mmllm.runtime.files import write_json

Rules = dict[str, Callable[[str, tuple[str, ...]], float]]  # name of a score: the score of an answer and its references


def evaluate(
    pipeline: MultimodalInferencePipeline,
    tasks: list[Task],
    config: GenerationConfig,
    out: Path,
    about: dict,
    *,
    evaluator: MultimodalEvaluator,
    slots: int,
    shuffle_seed: int | None,
    has_constant: bool,
) -> dict:
    """Asks everything with the true images and with exchanged ones, and scores the answers.

    Writes predictions and scores.json to `out`; returns the content of scores.json, which begins with `about`.

    `shuffle_seed` None does not ask again with exchanged images. `evaluator` scores the true images; METEOR, which is
    slow, is for them alone. `unreadable` in the result names the tasks that were left out.
    """
    runs = {"true images": tasks}
    if shuffle_seed is not None:
        if others := with_other_images(tasks, shuffle_seed):
            runs["shuffled images"] = others
        else:
            print("fewer than two images: there is nothing to exchange")
    without_meteor = MultimodalEvaluator(meteor=False)
    scores, unreadable, seconds = {}, set(), 0.0
    for name, asked in runs.items():
        start = time.perf_counter()
        predictions = predict(pipeline, asked, config, slots, name)
        seconds += time.perf_counter() - start
        unreadable |= {task.id for task, text in zip(tasks, predictions, strict=True) if text is None}
        write_predictions(out, tasks, predictions, suffix="" if asked is tasks else "_shuffled")
        scores[name] = score(tasks, predictions, evaluator if asked is tasks else without_meteor)
    if has_constant:
        scores["best constant"] = score(tasks, constant_predictions(tasks), without_meteor)
    result = about | {"generation": asdict(config), "seconds": round(seconds, 1)}
    result |= {"unreadable": sorted(unreadable), "scores": scores}
    write_results(out / "scores.json", result)
    return result


def score(tasks: list[Task], predictions: list[str | None], evaluator: MultimodalEvaluator) -> dict[str, dict]:
    """Scores of the captions, of the questions that several people answered ("vqa"), and of the others ("answers").

    Each part has its `count`, questions also `by_kind`. A task without prediction or references is not scored.
    """
    pairs = [
        (task, text) for task, text in zip(tasks, predictions, strict=True) if task.references and text is not None
    ]
    captions = [(task, text) for task, text in pairs if task.is_caption]
    by_people = [(task, text) for task, text in pairs if not task.is_caption and len(task.references) >= PEOPLE]
    others = [(task, text) for task, text in pairs if not task.is_caption and len(task.references) < PEOPLE]
    scores = {}
    if captions:
        measured = evaluator.evaluate_captioning([text for _, text in captions], [t.references for t, _ in captions])
        scores["captions"] = {"count": len(captions)} | measured
    if by_people:
        rules = {"vqa_accuracy": vqa_accuracy, "vqa_accuracy_normalised": vqa_accuracy_normalised}
        scores["vqa"] = mean_by_kind(by_people, rules)
    if others:
        scores["answers"] = mean_by_kind(others, {"accuracy": is_answer})
    return scores


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


def write_predictions(out: Path, tasks: list[Task], predictions: list[str | None], suffix: str) -> None:
    """Writes captions.json as COCO's server wants it and answers.json as VQAv2's does, if there are any."""
    pairs = [(task, text) for task, text in zip(tasks, predictions, strict=True) if text is not None]
    captions = [{"image_id": number_or_name(task.id), "caption": text} for task, text in pairs if task.is_caption]
    answers = [{"question_id": number_or_name(task.id), "answer": text} for task, text in pairs if not task.is_caption]
    for name, results in (("captions", captions), ("answers", answers)):
        path = out / f"{name}{suffix}.json"
        path.unlink(missing_ok=True)  # of an earlier evaluation
        if results:
            write_results(path, results)


def number_or_name(name: str) -> int | str:
    return int(name) if name.isdecimal() else name


def make_directory(path: Path) -> None:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_results(path: Path, content: object) -> None:
    with writing(path):
        write_json(path, content)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written, {error.strerror}; name another folder with --out") from error


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
        lines += ["", *aligned(cells)]
        if part == "captions" and first["count"] == 1:
            lines.append("CIDEr of a single image is 0 by its definition")
    return [*lines, ""] if lines else ["no sample has a reference: nothing to score", ""]


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
    return {name: value for name, value in scores.items() if name != "by_kind"} | kinds
