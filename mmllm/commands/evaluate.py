"""Measure a trained model on images with captions, on questions, or on both.

mmllm evaluate --model outputs/demo/best_model --data val.json
mmllm evaluate --model DIR --data dataset_coco.json --image-dir coco --split test --num-beams 3

Everything is asked twice, the second time with the images exchanged. A model that uses its images scores lower then; one
that only says what is usually said scores the same. `--constant` adds what needs no model: the one caption that suits
all images best, and the most common answer to each kind of question.

Written to --out: captions.json and answers.json (the result formats of COCO and VQAv2), the same with shuffled images,
and scores.json.
"""

import argparse
from pathlib import Path

from mmllm.commands import add_data_options, add_model_options, at_least_one, make_parser
from mmllm.errors import RunError
from mmllm.reporting.report import write_report

TASK_HELP = "auto: a sample is a caption if it has the default prompt or the kind `caption`, else a question"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("evaluate", __doc__)
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument("--split", default="val", help="part of Karpathy's files (default: %(default)s)")
    parser.add_argument("--task", choices=["auto", "caption", "question"], default="auto", help=TASK_HELP)
    parser.add_argument("--out", metavar="DIR", help="(default: evaluation/NAME OF THE DATA FILE of the model's run)")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="only the first N images or questions")
    parser.add_argument(
        "--slots", type=at_least_one, default=16, metavar="N", help="side by side (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=at_least_one, default=60, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--num-beams", type=at_least_one, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the exchange of images (default: %(default)s)")
    parser.add_argument("--no-shuffled", action="store_true", help="do not ask again with exchanged images")
    parser.add_argument("--constant", action="store_true", help="score the best constant caption and answers too")
    parser.add_argument("--meteor", action="store_true", help="METEOR too, for the true images; needs Java")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # torch takes two seconds to import: only now that the command line is known to be right
    from mmllm.data.samples import load_samples
    from mmllm.evaluation.evaluator import MultimodalEvaluator
    from mmllm.evaluation.results import evaluate, make_directory, table
    from mmllm.evaluation.tasks import check_images, tasks_of
    from mmllm.inference.pipeline import default_model, load_pipeline
    from mmllm.inference.request import GenerationConfig

    evaluator = MultimodalEvaluator(meteor=options.meteor)  # a missing Java is reported now, not after an hour
    tasks = tasks_of(load_samples(options.data, options.image_dir, options.split), options.task)[: options.limit]
    check_images(tasks)
    config = GenerationConfig(max_new_tokens=options.max_new_tokens, num_beams=options.num_beams)
    model = options.model or default_model()
    of_run = Path(model).parent if (Path(model).parent / "run.json").is_file() else None
    out = Path(options.out or (of_run or Path("outputs")) / "evaluation" / Path(options.data).stem)
    make_directory(out)
    found = evaluate(
        load_pipeline(model, device=options.device, dtype=options.dtype),
        tasks,
        config,
        out,
        {"model": str(model), "checkpoint": Path(model).resolve().name, "data": str(options.data)}
        | {"split": options.split, "seed": options.seed},
        evaluator=evaluator,
        slots=options.slots,
        shuffle_seed=None if options.no_shuffled else options.seed,
        has_constant=options.constant,
    )
    if of_run:
        write_report(of_run)
    print("\n".join(table(found["scores"])))
    print(f"{len(tasks)} asked, {found['seconds']} s; predictions and scores.json in {out}")
    if unreadable := found["unreadable"]:
        raise RunError(
            f"{len(unreadable)} of {len(tasks)} were left out because an image cannot be decoded (see above); the scores "
            "are those of the others"
        )
