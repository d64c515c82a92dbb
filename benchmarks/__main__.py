"""Measure the program on this machine, and other programs beside it.

python -m benchmarks train                       # one optimizer step, against transformers + peft
python -m benchmarks train --case "stage 1" --rounds 5
python -m benchmarks generate                    # answers, against transformers and llama.cpp where it is installed
python -m benchmarks caption                     # images a minute, against one image at a time
python -m benchmarks load                        # a server under load; --url names one that runs
python -m benchmarks memory                      # what --dry-run predicts, and what a step really takes
python -m benchmarks precision --model outputs/full/best_model --data val.json --image-dir images
python -m benchmarks rehearse configs/small.py training.gradient_accumulation_steps=2
python -m benchmarks table                       # the tables of docs/benchmarks.md, from the rows in benchmarks/

Every row goes to benchmarks/ as one JSON line with its date, commit, machine and command; the goals are printed beside.
`precision` only prints its rows: they are a model's, not the machine's.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.runner import serve_turns
from mmllm.commands import add_data_options, at_least_one
from mmllm.errors import run
from mmllm.runtime.threads import limit_threads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="auto", help="cuda or cpu (default: the best there is)")
    common.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny is for trying it out")
    common.add_argument("--layers", type=int, metavar="N", help="of both towers, at most (default: all of them)")
    common.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each (default: %(default)s)")
    common.add_argument("--out", type=Path, default=Path("benchmarks"), metavar="DIR", help="(default: %(default)s)")
    train = commands.add_parser("train", parents=[common], help="one optimizer step against transformers + peft")
    train.add_argument("--case", action="append", metavar="NAME", help="only this one; may be given several times")
    train.add_argument("--rows", type=int, metavar="N", help="of a step (default: 8, on a GPU 64)")
    train.add_argument("--float32", action="store_true", help="in place of bfloat16")
    generate = commands.add_parser("generate", parents=[common], help="answers, against transformers and llama.cpp")
    generate.add_argument("--precision", action="append", metavar="NAME", help="only this one; may be given again")
    generate.add_argument("--batch", action="append", type=int, metavar="N", help="answers side by side; again")
    generate.add_argument(
        "--new-tokens", type=int, default=128, metavar="N", help="of an answer (default: %(default)s)"
    )
    generate.add_argument(
        "--compiled-peer", action="store_true", help="transformers with its compiled step too: slow start"
    )
    memory = commands.add_parser("memory", parents=[common], help="predicted and measured peak memory of a step")
    memory.add_argument("--case", action="append", metavar="NAME", help="only this one; may be given several times")
    memory.add_argument("--rows", type=int, default=4, metavar="N", help="of a step (default: %(default)s)")
    memory.add_argument("--bf16-only", action="store_true", help="half of the cases")
    rehearse = commands.add_parser("rehearse", parents=[common], help="a whole run on random weights and images")
    rehearse.add_argument("settings", nargs="*", metavar="CONFIG | key=value", help="(default: configs/full.py)")
    rehearse.add_argument("--samples", type=int, default=32, metavar="N", help="(default: %(default)s)")
    caption = commands.add_parser("caption", parents=[common], help="images a minute, against one image at a time")
    caption.add_argument("--precision", action="append", metavar="NAME", help="only this one; may be given again")
    caption.add_argument("--images", type=int, default=24, metavar="N", help="(default: %(default)s)")
    caption.add_argument("--new-tokens", type=int, default=20, metavar="N", help="a caption (default: %(default)s)")
    caption.add_argument("--slots", type=int, default=8, metavar="N", help="images at once (default: %(default)s)")
    load = commands.add_parser("load", parents=[common], help="a server under load: answers, refusals, times, memory")
    load.add_argument("--url", help="of a server that runs (default: two are started, one of a tiny model)")
    load.add_argument("--requests", type=int, default=3000, metavar="N", help="compared (default: %(default)s)")
    for command in (generate, rehearse, caption, load):
        command.add_argument(
            "--models",
            type=Path,
            default=Path("outputs/bench"),
            metavar="DIR",
            help="random weights (default: %(default)s)",
        )
    precision = commands.add_parser("precision", help="how far the answers of a model move in each precision")
    precision.add_argument("--model", required=True, metavar="DIR", help="a model directory with float weights")
    add_data_options(precision)
    precision.add_argument(
        "--limit", type=at_least_one, default=32, metavar="N", help="(default: the first %(default)s)"
    )
    gpu = commands.add_parser("gpu", help="all that only a GPU can prove, in less than nine minutes")
    gpu.add_argument("--out", type=Path, default=Path("outputs/gpu"), metavar="DIR", help="(default: %(default)s)")
    table = commands.add_parser("table", help="write the tables of docs/benchmarks.md")
    table.add_argument("--out", type=Path, default=Path("benchmarks"), metavar="DIR", help="where the rows are")
    table.add_argument("--page", type=Path, default="docs/benchmarks.md", metavar="FILE", help="(default: %(default)s)")
    commands.add_parser("worker", help="one contestant, started by the others").add_argument("spec")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    commands = {"train": train, "generate": generate, "memory": memory, "rehearse": rehearse, "gpu": gpu}
    commands |= {"caption": caption, "precision": precision, "load": load}
    commands |= {"table": write_table, "worker": worker}
    return commands[options.command](options)


def worker(options: argparse.Namespace) -> int:
    """The process of one contestant. Other programs keep the threads that they come with."""
    spec = json.loads(options.spec)
    if spec["contestant"].startswith("mmllm"):
        limit_threads()
    module = {"train": "benchmarks.train", "generate": "benchmarks.generate", "memory": "benchmarks.memory"}[
        spec["bench"]
    ]
    serve_turns(spec, importlib.import_module(module).build)
    return 0


def train(options: argparse.Namespace) -> int:
    from benchmarks import train as bench_train
    from mmllm.errors import UserError
    from mmllm.runtime.device import choose_device

    device = choose_device(options.device)
    names = options.case or list(bench_train.BY_NAME)
    unknown = [name for name in names if name not in bench_train.BY_NAME]
    if unknown:
        raise UserError(f"--case {unknown[0]!r}: there are {', '.join(bench_train.BY_NAME)}")
    spec = {
        "device": device.type,
        "size": options.size,
        "layers": options.layers,
        "rows": options.rows or (64 if device.type == "cuda" else 8),
        "bf16": not options.float32,
    }
    return finish("train", bench_train.measure(names, spec, options.rounds), options)


def generate(options: argparse.Namespace) -> int:
    from benchmarks import generate as bench_generate
    from mmllm.runtime.device import choose_device

    device = choose_device(options.device)
    spec = {
        "device": device.type,
        "size": options.size,
        "layers": options.layers,
        "new_tokens": options.new_tokens,
        "compiled_peer": options.compiled_peer or device.type == "cuda",
        "compiled_own": device.type == "cuda",
    }
    precisions = options.precision or list(bench_generate.PRECISIONS_OF[device.type])
    batches = sorted(options.batch or bench_generate.BATCHES[device.type])
    rows = bench_generate.measure(spec, precisions, batches, options.rounds, options.models)
    return finish("generate", rows, options)


def memory(options: argparse.Namespace) -> int:
    from benchmarks import memory as bench_memory
    from mmllm.runtime.device import choose_device

    device = choose_device(options.device)
    spec = {"device": device.type, "size": options.size, "layers": options.layers, "rows": options.rows}
    variants = bench_memory.VARIANTS[: 2 if options.bf16_only else 4]
    return finish("memory", bench_memory.measure(options.case or list(bench_memory.CASES), spec, variants), options)


def rehearse(options: argparse.Namespace) -> int:
    from benchmarks import rehearse as bench_rehearse
    from mmllm.runtime.device import choose_device

    files = [item for item in options.settings if "=" not in item] or ["configs/full.py"]
    settings = [item for item in options.settings if "=" in item]
    spec = {"device": choose_device(options.device).type, "size": options.size, "layers": options.layers}
    rows = bench_rehearse.measure(spec, files[0], options.samples, settings, options.models)
    return finish("rehearse", rows, options)


def caption(options: argparse.Namespace) -> int:
    from benchmarks import caption as bench_caption
    from mmllm.runtime.device import choose_device

    spec = {"device": choose_device(options.device).type, "size": options.size, "layers": options.layers}
    precisions = options.precision or ["int8", "int8-dynamic"]
    rows = bench_caption.measure(
        spec, precisions, options.images, options.new_tokens, options.slots, options.rounds, options.models
    )
    return finish("caption", rows, options)


def load(options: argparse.Namespace) -> int:
    from benchmarks import load as bench_load

    return finish("load", bench_load.measure(options.size, options.requests, options.url, options.models), options)


def precision(options: argparse.Namespace) -> int:
    from benchmarks import precision as bench_precision

    bench_precision.measure(options.model, options.data, options.image_dir, options.limit)
    return 0


def gpu(options: argparse.Namespace) -> int:
    from benchmarks import gpu as bench_gpu

    return bench_gpu.measure_all(options.out)


def finish(kind: str, rows: list[dict], options: argparse.Namespace) -> int:
    """Save the rows and print the goals beside them."""
    from benchmarks import table as bench_table
    from benchmarks.rows import goal_lines, read_rows, save_rows, stamped
    from mmllm.runtime.console import print_rank0
    from mmllm.runtime.device import choose_device

    device = choose_device(options.device)
    path = save_rows(options.out, kind, stamped(rows, device, sys.argv[1:]))
    for what, measured, goal, is_met in goal_lines(bench_table.GOALS, kind, read_rows(options.out, kind), device.type):
        print_rank0(f"{what}: {measured} ({goal}: {is_met})")
    print_rank0(f"{len(rows)} rows in {path}")
    return 0


def write_table(options: argparse.Namespace) -> int:
    from benchmarks.rows import rewritten
    from benchmarks.table import tables
    from mmllm.runtime.console import print_rank0

    text = options.page.read_text(encoding="utf-8")
    options.page.write_text(rewritten(text, tables(options.out)), encoding="utf-8")
    print_rank0(f"the tables in {options.page} are those of the rows in {options.out}")
    return 0


if __name__ == "__main__":
    run(main)
