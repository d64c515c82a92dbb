"""The command lines: `mmllm NAME`, one module for each name, with `parse` and `main`.

No module imports torch before its command line has been read, so `--help` answers at once.
"""

import argparse
from dataclasses import fields

from mmllm.config.schema import PRECISIONS
from mmllm.runtime.machine import program


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the command as it was typed: `mmllm NAME`, `python -m mmllm NAME` or a script."""
    words = program()
    typed = " ".join(words) if words[-1].endswith(".py") else f"{' '.join(words)} {name}"
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


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="FILE", help="samples in any supported format")
    parser.add_argument("--image-dir", metavar="DIR", help="where the images are (default: beside FILE)")


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least 1")
    return number


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """The options named as the fields of `GenerationConfig`, with its defaults."""
    parser.add_argument("--max-new-tokens", type=at_least_one, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (default)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off (default)")
    parser.add_argument("--num-beams", type=at_least_one, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="L", help="of beams (default: 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")


def generation_config(options: argparse.Namespace):
    """The `GenerationConfig` of those options."""
    from mmllm.inference.request import GenerationConfig

    values = {
        field.name: getattr(options, field.name) for field in fields(GenerationConfig) if hasattr(options, field.name)
    }
    return GenerationConfig(**values | {"stop": tuple(options.stop)})
