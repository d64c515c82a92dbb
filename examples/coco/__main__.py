"""The whole public recipe: `make coco`, or `python -m examples.coco`, on a machine with the internet and a GPU.

    python -m examples.coco                                      # 120 GB of disk, see docs/evaluation.md for the hours
    python -m examples.coco --processes 8                        # on eight GPUs, by torchrun
    python -m examples.coco stage2.gradient_accumulation_steps=8 data.batch_size=16    # settings of every training

Each step is a command that could be typed, printed before it runs. A step that is done is not done again: after a crash
start the same line again.
"""

import argparse
from pathlib import Path

from mmllm.commands import at_least_one
from mmllm.errors import run
from mmllm.runtime.threads import limit_threads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.coco", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = "(default: %(default)s)"
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of every training")
    parser.add_argument("--clip", default="openai/clip-vit-base-patch32", metavar="SOURCE", help=shown)
    parser.add_argument("--qwen", default="Qwen/Qwen2.5-0.5B-Instruct", metavar="SOURCE", help=shown)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help=shown)
    parser.add_argument("--table", type=Path, metavar="FILE", help="hosts of the data, in place of the official ones")
    parser.add_argument("--out", type=Path, default=Path("outputs/public"), metavar="DIR", help=shown)
    parser.add_argument("--device", default="auto", help=shown)
    parser.add_argument("--processes", type=at_least_one, default=1, metavar="N", help="GPUs to use, by torchrun")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    limit_threads()
    from examples.coco.recipe import run_recipe
    from examples.coco.report import write_report

    run_recipe(options)
    print(write_report(options.out))


if __name__ == "__main__":
    run(main)
