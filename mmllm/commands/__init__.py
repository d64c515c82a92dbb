"""The command lines: `mmllm NAME`, one module for each name, with `parse` and `main`.

No module imports torch before its command line has been read, so `--help` answers at once.
"""

import argparse
import sys
from pathlib import Path

from mmllm.config.schema import PRECISIONS


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the command as it was typed: `mmllm NAME`, `python -m mmllm NAME` or a script."""
    started = Path(sys.argv[0]).name
    typed = {"mmllm": f"mmllm {name}", "__main__.py": f"python -m mmllm {name}"}.get(started, f"python {started}")
    return argparse.ArgumentParser(
        prog=typed,
        description=(description or "").replace(f"mmllm {name}", typed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--device` and `--dtype` of the commands that answer with a model."""
    parser.add_argument("--model", metavar="DIR", help="directory or hub name (default: the newest under outputs/)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=PRECISIONS, help="(default: bfloat16 on CUDA, else float32)")


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least 1")
    return number
