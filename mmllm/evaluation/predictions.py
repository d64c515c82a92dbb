"""Predictions: gathered from all processes, kept where an evaluation is interrupted, and the result files of COCO and VQA."""

import hashlib
import json
from pathlib import Path

from mmllm.errors import DataError, UserError
from mmllm.evaluation.tasks import Task, predict
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import GenerationConfig
from mmllm.runtime.console import progress, stderr_rank0
from mmllm.runtime.distributed import World
from mmllm.runtime.files import read_json_lines, write_atomically, write_json, writing

Predictions = list[str | None]  # one for each task; None where its image cannot be decoded
UNFINISHED = "unfinished.jsonl"
MEND = "name another folder with --out"
RESULT_KEYS = (("image_id", "caption"), ("question_id", "answer"), ("questionId", "prediction"))  # COCO, VQA, GQA


def collect(
    pipeline: MultimodalInferencePipeline,
    runs: dict[str, list[Task]],
    config: GenerationConfig,
    out: Path,
    key: str,
    *,
    slots: int,
    world: World,
) -> dict[str, Predictions]:
    """The answers to the tasks of each run; every process of `world` asks its share and gets all answers.

    Each answer is written to `out` at once. What an interrupted evaluation with the same `key` left there is not asked
    again, whatever the number of its processes.
    """
    asked = hashlib.sha256(f"{key} {config}".encode())
    for name, tasks in runs.items():
        asked.update(name.encode())
        for task in tasks:
            asked.update(repr((task.id, task.messages, task.images)).encode())
    key = world.on_rank0(asked.hexdigest)  # on another machine the same files may have other times
    done = world.on_rank0(lambda: merge(out, key))
    if done:
        stderr_rank0(f"{out / UNFINISHED}: {len(done)} answers of an interrupted evaluation are kept")
    path = out / f"{UNFINISHED}.part{world.rank}"
    with writing(path, MEND, UserError), path.open("w", encoding="utf-8", buffering=1) as file:
        file.write(json.dumps(key) + "\n")
        for name, tasks in runs.items():
            todo = [i for i in range(len(tasks)) if (name, i) not in done][world.rank :: world.size]
            answers = predict(pipeline, [tasks[i] for i in todo], config, slots)
            for i, text in zip(todo, progress(answers, len(todo), name), strict=True):
                file.write(json.dumps([name, i, text]) + "\n")
    world.sum([0])  # waits for the other processes
    done = world.on_rank0(lambda: merge(out, key))
    return {name: [done[name, i] for i in range(len(tasks))] for name, tasks in runs.items()}


def merge(out: Path, key: str) -> dict[tuple[str, int], str | None]:
    """The answers by run and number that files of `key` in `out` hold, which become one file; others are removed."""
    done = {}
    parts = sorted(out.glob(f"{UNFINISHED}*"))
    for path in parts:
        first, *rows = read_json_lines(path) or [None]
        done |= {(name, i): text for name, i, text in rows} if first == key else {}
    if done:
        lines = [key, *([name, i, text] for (name, i), text in done.items())]
        write_atomically(out / UNFINISHED, "".join(json.dumps(line) + "\n" for line in lines).encode())
    for path in parts:
        if path.name != UNFINISHED or not done:
            path.unlink()
    return done


def read_predictions(paths: list[Path], tasks: list[Task]) -> Predictions:
    """The answers to `tasks` in result files of COCO, VQA or GQA. DataError for other files and for two answers to a task.

    None where there is no answer, which a line on stderr counts.
    """
    found: dict[tuple[bool, str], str] = {}
    for path in paths:
        for number, row in enumerate(read_results(path)):
            keys = next((keys for keys in RESULT_KEYS if isinstance(row, dict) and set(keys) <= row.keys()), None)
            if keys is None:
                wanted = ", or ".join(" and ".join(f"`{key}`" for key in keys) for keys in RESULT_KEYS)
                raise DataError(f"{path}: result {number} needs {wanted}")
            task = (keys[0] == "image_id", str(row[keys[0]]))
            if task in found:
                raise DataError(f"{path}: result {number}: a second answer for {keys[0]} {task[1]}; keep one of them")
            found[task] = str(row[keys[1]])
    predictions = [found.get((task.is_caption, task.id)) for task in tasks]
    if missing := [task.id for task, text in zip(tasks, predictions, strict=True) if text is None]:
        stderr_rank0(f"warning: no prediction for {len(missing)} of {len(tasks)}, the first is {missing[0]}")
    return predictions


def read_results(path: Path) -> list:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: a list of results is needed, not {type(content).__name__}")
    return content


def write_predictions(out: Path, tasks: list[Task], predictions: Predictions, suffix: str) -> None:
    """Writes captions.json as COCO's server wants it and answers.json as VQAv2's does, if there are any."""
    pairs = [(task, text) for task, text in zip(tasks, predictions, strict=True) if text is not None]
    captions = [{"image_id": number_or_name(task.id), "caption": text} for task, text in pairs if task.is_caption]
    answers = [{"question_id": number_or_name(task.id), "answer": text} for task, text in pairs if not task.is_caption]
    for name, results in (("captions", captions), ("answers", answers)):
        path = out / f"{name}{suffix}.json"
        path.unlink(missing_ok=True)  # of an earlier evaluation
        if results:
            write_json(path, results)


def number_or_name(name: str) -> int | str:
    return int(name) if name.isdecimal() and name == str(int(name)) else name
