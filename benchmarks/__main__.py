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
import json
import sys
from collections.abc import Callable, Iterable
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
    stored = argparse.ArgumentParser(add_help=False)
    stored.add_argument("--models", type=Path, default=Path("outputs/bench"), metavar="DIR",
                        help="random weights (default: %(default)s)")  # fmt: skip

    def command(name: str, about: str, *parents: argparse.ArgumentParser) -> Callable[..., object]:
        return commands.add_parser(name, parents=parents, help=about).add_argument

    def number(add: Callable[..., object], name: str, default: int | None, about: str = "") -> None:
        add(name, type=int, default=default, metavar="N", help=f"{about} (default: %(default)s)".strip())

    again = {"action": "append", "metavar": "NAME", "help": "only this one; may be given several times"}
    add = command("train", "one optimizer step against transformers + peft", common)
    add("--case", **again)
    add("--rows", type=int, metavar="N", help="of a step (default: 8, on a GPU 64)")
    add("--float32", action="store_true", help="in place of bfloat16")
    add = command("generate", "answers, against transformers and llama.cpp", common, stored)
    add("--precision", **again)
    add("--batch", type=int, **again | {"metavar": "N", "help": "answers side by side; may be given several times"})
    number(add, "--new-tokens", 128, "of an answer")
    add = command("memory", "predicted and measured peak memory of a step", common)
    add("--case", **again)
    number(add, "--rows", 4, "of a step")
    add("--bf16-only", action="store_true", help="half of the cases")
    add = command("rehearse", "a whole run on random weights and images", common, stored)
    add("settings", nargs="*", metavar="CONFIG | key=value", help="(default: configs/full.py)")
    number(add, "--samples", 32)
    add = command("caption", "images a minute, against one image at a time", common, stored)
    add("--precision", **again)
    number(add, "--images", 24)
    number(add, "--new-tokens", 20, "a caption")
    number(add, "--slots", 8, "images at once")
    add = command("load", "a server under load: answers, refusals, times, memory", common, stored)
    add("--url", help="of a server that runs (default: two are started, one of a tiny model)")
    number(add, "--requests", 3000, "compared")
    precision = commands.add_parser("precision", help="how far the answers of a model move in each precision")
    precision.add_argument("--model", required=True, metavar="DIR", help="a model directory with float weights")
    add_data_options(precision)
    precision.add_argument(
        "--limit", type=at_least_one, default=32, metavar="N", help="(default: the first %(default)s)"
    )
    add = command("gpu", "all that only a GPU can prove, in less than nine minutes")
    add("--out", type=Path, default=Path("outputs/gpu"), metavar="DIR", help="(default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try every part out, with tiny models")
    add = command("table", "write the tables of docs/benchmarks.md, and say which ratios have become worse")
    add("--out", type=Path, default=Path("benchmarks"), metavar="DIR", help="where the rows are")
    add("--page", type=Path, default="docs/benchmarks.md", metavar="FILE", help="(default: %(default)s)")
    command("worker", "one contestant, started by the others")("spec")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return COMMANDS[options.command](options)


def worker(options: argparse.Namespace) -> int:
    """The process of one contestant. Other programs keep the threads that they come with."""
    spec = json.loads(options.spec)
    if spec["contestant"].startswith("mmllm"):
        limit_threads()
    serve_turns(spec)
    return 0


def spec_of(options: argparse.Namespace, **more: object) -> dict:
    from mmllm.runtime.device import choose_device

    return {"device": choose_device(options.device).type, "size": options.size, "layers": options.layers} | more


def train(options: argparse.Namespace) -> int:
    from benchmarks import train as bench_train
    from mmllm.errors import UserError

    names = options.case or list(bench_train.BY_NAME)
    unknown = [name for name in names if name not in bench_train.BY_NAME]
    if unknown:
        raise UserError(f"--case {unknown[0]!r}: there are {', '.join(bench_train.BY_NAME)}")
    spec = spec_of(options, bf16=not options.float32)
    spec["rows"] = options.rows or (64 if spec["device"] == "cuda" else 8)
    return finish("train", bench_train.measure(names, spec, options.rounds), options)


def generate(options: argparse.Namespace) -> int:
    from benchmarks import generate as bench_generate

    spec = spec_of(options, new_tokens=options.new_tokens)
    precisions = options.precision or list(bench_generate.PRECISIONS_OF[spec["device"]])
    batches = sorted(options.batch or bench_generate.BATCHES[spec["device"]])
    rows = bench_generate.measure(spec, precisions, batches, options.rounds, options.models)
    return finish("generate", rows, options)


def memory(options: argparse.Namespace) -> int:
    from benchmarks import memory as bench_memory

    spec, variants = spec_of(options, rows=options.rows), bench_memory.VARIANTS[: 2 if options.bf16_only else 4]
    return finish("memory", [bench_memory.measure(options.case or list(bench_memory.CASES), spec, variants)], options)


def rehearse(options: argparse.Namespace) -> int:
    from benchmarks import rehearse as bench_rehearse

    files = [item for item in options.settings if "=" not in item] or ["configs/full.py"]
    settings = [item for item in options.settings if "=" in item]
    rows = bench_rehearse.measure(spec_of(options), files[0], options.samples, settings, options.models)
    return finish("rehearse", [rows], options)


def caption(options: argparse.Namespace) -> int:
    from benchmarks import caption as bench_caption

    precisions = options.precision or ["int8", "int8-dynamic"]
    rows = bench_caption.measure(
        spec_of(options), precisions, options.images, options.new_tokens, options.slots, options.rounds, options.models
    )
    return finish("caption", [rows], options)


def load(options: argparse.Namespace) -> int:
    from benchmarks import load as bench_load

    return finish("load", [bench_load.measure(options.size, options.requests, options.url, options.models)], options)


def precision(options: argparse.Namespace) -> int:
    from benchmarks import precision as bench_precision

    bench_precision.measure(options.model, options.data, options.image_dir, options.limit)
    return 0


def gpu(options: argparse.Namespace) -> int:
    from benchmarks import gpu as bench_gpu

    return bench_gpu.measure_all(options.out, options.device)


def finish(kind: str, groups: Iterable[list[dict]], options: argparse.Namespace) -> int:
    """Save each group of rows as soon as it is measured, then their ratios, and print the goals beside them."""
    from benchmarks.rows import goal_lines, read_rows, remember, save_rows, stamped
    from benchmarks.table import GOALS
    from mmllm.runtime.console import print_rank0
    from mmllm.runtime.device import choose_device

    device = choose_device(options.device)
    for rows in groups:
        print_rank0(f"{len(rows)} rows in {save_rows(options.out, kind, stamped(rows, device, sys.argv[1:]))}")
    remember(options.out, kind, GOALS)
    for what, measured, goal, is_met in goal_lines(GOALS, kind, read_rows(options.out, kind), device.type):
        print_rank0(f"{what}: {measured} ({goal}: {is_met})")
    return 0


def write_table(options: argparse.Namespace) -> int:
    from benchmarks.rows import rewritten
    from benchmarks.table import regressions, tables
    from mmllm.runtime.console import print_rank0

    text = options.page.read_text(encoding="utf-8")
    options.page.write_text(rewritten(text, tables(options.out)), encoding="utf-8")
    for line in regressions(options.out):
        print_rank0(f"\033[31m{line}\033[0m" if sys.stdout.isatty() else line)
    print_rank0(f"the tables in {options.page} are those of the rows in {options.out}")
    return 0


COMMANDS = {"train": train, "generate": generate, "memory": memory, "rehearse": rehearse, "caption": caption}
COMMANDS |= {"load": load, "precision": precision, "gpu": gpu, "table": write_table, "worker": worker}

if __name__ == "__main__":
    run(main)
