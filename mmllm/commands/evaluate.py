"""Measure a trained model on images with captions, on questions, or on both; or score the results of any model.

mmllm evaluate --model outputs/demo/best_model --data val.json
mmllm evaluate --model DIR --data dataset_coco.json --image-dir coco --split test --num-beams 3
mmllm evaluate --data val.json --predictions captions.json answers.json
torchrun --nproc_per_node=4 -m mmllm evaluate --model DIR --data val.json

Everything is asked twice, the second time with the images exchanged. A model that uses its images scores lower then; one
that only says what is usually said scores the same. `--blank` asks a third time with an image of one color, `--constant`
adds what needs no model: the one caption that suits all images best, and the most common answer to each kind of question.

Written to --out: captions.json and answers.json (the result formats of COCO and VQAv2), the same with shuffled images,
scores.json, and samples.html, the best and worst answers with their images. An evaluation that was interrupted continues
when it is started again.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from mmllm.commands import add_data_options, add_model_options, at_least_one, make_parser
from mmllm.errors import RunError, UserError
from mmllm.reporting.report import write_report
from mmllm.runtime.console import is_rank0, print_rank0
from mmllm.runtime.files import write_json, writing

TASK_HELP = "auto: a sample is a caption if it has the default prompt or the kind `caption`, else a question"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("evaluate", __doc__)
    add = parser.add_argument
    add_model_options(parser)
    add_data_options(parser)
    add("--split", default="val", help="part of Karpathy's files (default: %(default)s)")
    add("--task", choices=["auto", "caption", "question"], default="auto", help=TASK_HELP)
    add(
        "--short",
        action="store_true",
        help="ask questions for a single word or phrase, as LLaVA's mixture and `make coco` do",
    )
    add("--out", metavar="DIR", help="(default: evaluation/NAME OF THE DATA FILE of the model's run)")
    add("--limit", type=at_least_one, metavar="N", help="only the first N images or questions")
    add("--slots", type=at_least_one, default=16, metavar="N", help="side by side (default: %(default)s)")
    add("--max-new-tokens", type=at_least_one, default=60, metavar="N", help="(default: %(default)s)")
    add("--num-beams", type=at_least_one, default=1, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the exchange of images (default: %(default)s)")
    add("--no-shuffled", action="store_true", help="do not ask again with exchanged images")
    add("--constant", action="store_true", help="score the best constant caption and answers too")
    add("--blank", action="store_true", help="ask again with blank images")
    add("--meteor", action="store_true", help="METEOR too, for the true images; needs Java")
    add("--spice", action="store_true", help="SPICE too; needs Java, downloads 400 MB once")
    add("--clip-score", metavar="SOURCE", help="CLIPScore by this CLIP; needs transformers")
    add("--predictions", nargs="+", type=Path, metavar="FILE", help="score these result files; no model is loaded")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # torch takes two seconds to import: only now that the command line is known to be right
    from mmllm.data.public import shortly
    from mmllm.data.samples import load_samples
    from mmllm.evaluation.evaluator import MultimodalEvaluator
    from mmllm.evaluation.predictions import MEND, read_predictions
    from mmllm.evaluation.tasks import check_images, tasks_of
    from mmllm.inference.pipeline import default_model

    evaluator = MultimodalEvaluator(options.meteor, options.spice)  # a missing Java is reported now, not after an hour
    tasks = tasks_of(load_samples(options.data, options.image_dir, options.split), options.task)[: options.limit]
    if options.short:
        tasks = [task if task.is_caption else replace(task, messages=shortly(task.messages)) for task in tasks]
    if options.predictions:
        model, of_run, about = None, None, {"model": ", ".join(map(str, options.predictions))}
    else:
        check_images(tasks)
        model = options.model or default_model()
        of_run = Path(model).parent if (Path(model).parent / "run.json").is_file() else None
        about = {"model": str(model), "checkpoint": Path(model).resolve().name}
    out = Path(options.out or (of_run or Path("outputs")) / "evaluation" / Path(options.data).stem)
    refuse_other_data(out, options.data)
    with writing(out, MEND, UserError):
        out.mkdir(parents=True, exist_ok=True)
    about |= {"data": str(options.data), "split": options.split, "short": options.short, "seed": options.seed}
    if options.predictions:
        predictions = {"true images": read_predictions(options.predictions, tasks)}
    else:
        predictions, generation = answer(options, model, tasks, out, about)
        about |= generation
    if is_rank0():
        report(options, tasks, predictions, out, about, evaluator)
        if of_run:
            write_report(of_run)
        if missing := sum(text is None for text in predictions["true images"]):
            why = "they have no prediction" if options.predictions else "an image cannot be decoded"
            raise RunError(
                f"{missing} of {len(tasks)} were left out because {why} (see above); the scores are those of the others"
            )


def refuse_other_data(out: Path, data: str) -> None:
    scores = out / "scores.json"
    if scores.exists() and (before := json.loads(scores.read_text(encoding="utf-8")).get("data")) != str(data):
        raise UserError(f"{out}: holds the scores of {before}; name another folder with --out, or remove it")


def answer(options: argparse.Namespace, model: str, tasks: list, out: Path, about: dict) -> tuple[dict, dict]:
    """The model's answers by kind of images, and what else scores.json says of them."""
    from mmllm.evaluation.predictions import collect
    from mmllm.evaluation.tasks import with_blank_images, with_other_images
    from mmllm.inference.pipeline import load_pipeline
    from mmllm.inference.request import GenerationConfig
    from mmllm.runtime.distributed import World
    from mmllm.storage.hub import locate

    config = GenerationConfig(max_new_tokens=options.max_new_tokens, num_beams=options.num_beams)
    runs = {"true images": tasks}
    if not options.no_shuffled:
        if others := with_other_images(tasks, options.seed):
            runs["shuffled images"] = others
        else:
            print_rank0("fewer than two images: there is nothing to exchange")
    start = time.perf_counter()
    with World.start(options.device) as world:
        if options.blank:
            runs["blank images"] = world.on_rank0(lambda: with_blank_images(tasks, out / "blank.png"))
        pipeline = load_pipeline(model, device=str(world.device), dtype=options.dtype)
        files = sorted((path.name, path.stat().st_size, path.stat().st_mtime) for path in locate(model).iterdir())
        key = f"{about} {options.dtype} {files}"
        predictions = collect(pipeline, runs, config, out, key, slots=options.slots, world=world)
    return predictions, {"generation": asdict(config), "seconds": round(time.perf_counter() - start, 1)}


def report(options: argparse.Namespace, tasks: list, predictions: dict, out: Path, about: dict, evaluator) -> None:
    """Writes scores.json, samples.html and the result files, and prints the table."""
    from mmllm.evaluation.predictions import MEND, UNFINISHED, write_predictions
    from mmllm.evaluation.results import constant_predictions, measure, score_runs, table
    from mmllm.evaluation.sheet import write_sheet

    with writing(out, MEND, UserError):
        for name, texts in predictions.items():
            write_predictions(out, tasks, texts, suffix="" if name == "true images" else f"_{name.split()[0]}")
        constant = {"best constant": constant_predictions(tasks)} if options.constant else {}
        runs = {name: measure(tasks, texts) for name, texts in (predictions | constant).items()}
        scores = score_runs(runs, evaluator, options.clip_score, options.device)
        unreadable = {task.id for task, text in zip(tasks, predictions["true images"], strict=True) if text is None}
        write_json(out / "scores.json", about | {"unreadable": sorted(unreadable), "scores": scores})
        write_sheet(out / "samples.html", runs["true images"], options.seed)
        (out / UNFINISHED).unlink(missing_ok=True)
    print("\n".join(table(scores)))
    print(f"{len(tasks)} asked; predictions, scores.json and samples.html in {out}")
