"""What is asked of a model, what it answers, and what that scores: `mmllm evaluate`."""

import json
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from mmllm.errors import DataError, UserError
from mmllm.evaluation.scoring import (
    MultimodalEvaluator,
    best_constant_caption,
    is_answer,
    vqa_accuracy,
    vqa_accuracy_normalised,
)

PEOPLE = 4  # a question that this many answered is scored by VQA's rule, which needs that many for full marks


@dataclass(frozen=True)
class Task:
    """One thing to say: the turns so far with their pictures, and what would be right. `is_caption`: not a question."""

    id: str
    messages: tuple
    images: tuple[Path, ...]
    references: tuple[str, ...]
    kind: str
    is_caption: bool


def tasks_of(samples: list, task: str = "auto") -> list[Task]:
    """What each picture or question is asked, once: the samples of one record are one task, and so are records that
    caption the same picture."""
    from mmllm.data.samples import CAPTION_PROMPT

    tasks: dict[tuple, Task] = {}
    seen = set()
    for sample in samples:
        answers = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
        messages = sample.messages[: answers[-1]] if answers else sample.messages
        images = sample.images[: sum(message.num_images for message in messages)]
        asked = "".join(part for part in messages[-1].parts if isinstance(part, str)).strip() if messages else ""
        is_caption = task == "caption" or (task == "auto" and (sample.kind == "caption" or asked == CAPTION_PROMPT))
        record = record_of(sample)
        key = (messages, images) if is_caption else (messages, images, record)
        if (key, record) in seen:
            continue
        seen.add((key, record))
        if key in tasks:
            tasks[key] = replace(tasks[key], references=(*tasks[key].references, *sample.references))
        else:
            tasks[key] = Task(record, messages, images, sample.references, sample.kind, is_caption)
    return list(tasks.values())


def record_of(sample) -> str:
    """The id of the record that a sample comes from: data.py numbers the samples of a record with several captions."""
    record, mark, number = sample.id.rpartition("#")
    is_numbered = mark and number.isdecimal() and int(number) < len(sample.references) > 1
    return record if is_numbered else sample.id


def check_pictures(tasks: list[Task]) -> None:
    """Raises DataError for pictures that are missing or broken, before anything is paid for."""
    from mmllm.data.checks import image_fault

    faults = [
        fault for path in sorted({path for task in tasks for path in task.images}) if (fault := image_fault(path))
    ]
    if faults:
        raise DataError(f"{len(faults)} pictures cannot be used, the first is {faults[0]}")


def with_other_pictures(tasks: list[Task], seed: int) -> list[Task]:
    """The tasks with every picture replaced by another one, the same for all tasks; none if there is no other one."""
    paths = sorted({path for task in tasks for path in task.images})
    if len(paths) < 2:
        return []
    random.Random(seed).shuffle(paths)
    other = dict(zip(paths, paths[1:] + paths[:1], strict=True))
    return [replace(task, images=tuple(other[path] for path in task.images)) for task in tasks]


def predict(pipeline, tasks: list[Task], config, slots: int, name: str) -> list[str]:
    """What the model says, in the order of the tasks, `slots` of them side by side; pictures are read a few ahead."""
    from mmllm.data.batches import prefetch
    from mmllm.inference.generate import generate

    def prompt(number: int):
        return pipeline.prompt(list(tasks[number].messages), list(tasks[number].images))

    prompts = prefetch(prompt, range(len(tasks)), num_workers=2)
    said = []
    for answer in generate(pipeline.model, prompts, config, slots=slots, is_exact=False):
        said.append(answer.text.strip())
        if sys.stderr.isatty():
            print(f"\r{name}: {len(said)} of {len(tasks)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return said


def score(tasks: list[Task], predictions: list[str], evaluator: MultimodalEvaluator) -> dict[str, dict]:
    """Scores of the captions, of the questions that several people answered ("vqa"), and of the others ("answers").

    Each holds its `count`; questions also `by_kind`. What has no reference is not scored.
    """
    pairs = [(task, text) for task, text in zip(tasks, predictions, strict=True) if task.references]
    captions = [(task, text) for task, text in pairs if task.is_caption]
    asked = [(task, text) for task, text in pairs if not task.is_caption]
    scores = {}
    if captions:
        references = [task.references for task, _ in captions]
        measured = evaluator.evaluate_captioning([text for _, text in captions], references)
        scores["captions"] = {"count": len(captions)} | measured
    if people := [(task, text) for task, text in asked if len(task.references) >= PEOPLE]:
        scores["vqa"] = mean_by_kind(
            people, {"vqa_accuracy": vqa_accuracy, "vqa_accuracy_normalised": vqa_accuracy_normalised}
        )
    if single := [(task, text) for task, text in asked if len(task.references) < PEOPLE]:
        scores["answers"] = mean_by_kind(single, {"accuracy": is_answer})
    return scores


def mean_by_kind(pairs: list[tuple[Task, str]], rules: dict) -> dict:
    """The mean of each rule over all pairs, and over those of each kind of question where kinds are given."""
    kinds = sorted({task.kind for task, _ in pairs} - {""})
    parts = {kind: [pair for pair in pairs if pair[0].kind == kind] for kind in kinds}
    result = {"count": len(pairs)} | {name: mean(rule, pairs) for name, rule in rules.items()}
    if kinds:
        result["by_kind"] = {
            kind: {"count": len(part)} | {name: mean(rule, part) for name, rule in rules.items()}
            for kind, part in parts.items()
        }
    return result


def mean(rule, pairs: list[tuple[Task, str]]) -> float:
    return sum(rule(text, task.references) for task, text in pairs) / len(pairs)


def constant_predictions(tasks: list[Task]) -> list[str]:
    """What can be said without a look: the caption most like all, and the most common answer to each kind of question."""
    captions = [task.references for task in tasks if task.is_caption and task.references]
    caption = best_constant_caption(captions) if captions else ""
    answers = defaultdict(Counter)
    for task in tasks:
        answers[task.kind].update(task.references if not task.is_caption else ())
    common = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items() if counts}
    return [caption if task.is_caption else common.get(task.kind, "") for task in tasks]


def write_predictions(out: Path, tasks: list[Task], predictions: list[str], suffix: str) -> None:
    """captions.json as COCO's server wants it, answers.json as VQAv2's does; only what there is."""
    pairs = list(zip(tasks, predictions, strict=True))
    captions = [{"image_id": number_or_name(task.id), "caption": text} for task, text in pairs if task.is_caption]
    answers = [{"question_id": number_or_name(task.id), "answer": text} for task, text in pairs if not task.is_caption]
    for name, results in (("captions", captions), ("answers", answers)):
        path = out / f"{name}{suffix}.json"
        path.unlink(missing_ok=True)  # of an earlier evaluation
        if results:
            write_json(path, results)


def number_or_name(name: str) -> int | str:
    return int(name) if name.isdecimal() else name


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made, {error.strerror}; name another folder with --out") from error


def write_json(path: Path, content: object) -> None:
    try:
        temporary = path.with_suffix(".tmp")  # a report may read it at any time
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written, {error.strerror}; name another folder with --out") from error


def table(rows: dict[str, dict]) -> list[str]:
    """Lines to print: a block for the captions, one for each kind of scoring of answers."""
    lines = []
    for part in ("captions", "vqa", "answers"):
        found = {name: flat(scores[part]) for name, scores in rows.items() if part in scores}
        if not found:
            continue
        count = next(iter(found.values()))["count"]
        columns = [column for column in next(iter(found.values())) if column != "count"]
        widths = [max(8, len(column) + 2) for column in columns]
        heads = "".join(column.rjust(width) for column, width in zip(columns, widths, strict=True))
        lines += ["", f"{part} ({count})".ljust(20) + heads]
        for name, values in found.items():
            cells = [f"{values[column]:.4f}" if column in values else "-" for column in columns]
            lines.append(name.ljust(20) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
        if part == "captions" and count == 1:
            lines.append("CIDEr of a single picture is 0 by its definition")
    return [*lines, ""] if lines else ["no sample has a reference: nothing to score", ""]


def flat(scores: dict) -> dict[str, float]:
    """The scores of a part with the kinds of question as columns of their own."""
    kinds = scores.get("by_kind", {})
    first = "accuracy" if "accuracy" in scores else "vqa_accuracy"
    return {name: value for name, value in scores.items() if name != "by_kind"} | {
        kind: values[first] for kind, values in kinds.items()
    }
