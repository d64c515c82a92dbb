"""The demo, or one of its parts: `python -m examples.shapes demo`."""

import argparse
from pathlib import Path

from mmllm.errors import run
from mmllm.runtime.threads import limit_threads

OUT = Path("outputs/shapes")  # README names images in it


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.shapes", description=__doc__)
    parser.add_argument("command", choices=["demo", "backbones", "data"])
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args()
    limit_threads()
    from examples.shapes import backbones, demo

    if options.command == "demo":
        demo.demo(options.out, Path("outputs/demo"))
    elif options.command == "backbones":
        backbones.make_backbones(options.out / "backbones")
    else:
        demo.write_data(options.out / "data")


if __name__ == "__main__":
    run(main)
