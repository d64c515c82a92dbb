"""An evaluation: ask everything with the true images and with exchanged ones, score, and write the results."""

import time
from dataclasses import asdict
from pathlib import Path

from mmllm.evaluation.evaluator import MultimodalEvaluator
from mmllm.evaluation.results import constant_predictions, score, write_predictions, write_results
from mmllm.evaluation.tasks import Task, predict, with_other_images
from mmllm.inference.pipeline import MultimodalInferencePipeline
from mmllm.inference.request import GenerationConfig


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
    """Writes predictions and scores.json to `out`; returns the content of scores.json, which begins with `about`.

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
