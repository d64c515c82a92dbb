"""Make both backbones from images with captions or questions: `python -m examples.pretrain --data FILE --out DIR`."""

import argparse

from mmllm.errors import run
from mmllm.runtime.threads import limit_threads


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pretrain", description="Make both backbones from captions."
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="images with captions, or with questions and answers"
    )
    parser.add_argument("--image-dir", metavar="DIR", help="where the images are (default: beside FILE)")
    parser.add_argument("--out", required=True, metavar="DIR", help="writes DIR/clip and DIR/qwen")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--vision-width", type=int, default=192)
    parser.add_argument("--vision-layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=3000)
    parser.add_argument("--text-width", type=int, default=192)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--clip-steps", type=int, default=3600)
    parser.add_argument("--clip-batch", type=int, default=64)
    parser.add_argument("--qwen-steps", type=int, default=600)
    parser.add_argument("--word-loss", type=float, default=0.1, help="weight of word prediction (default: %(default)s)")
    parser.add_argument(
        "--guide-steps",
        type=int,
        default=0,
        help="for photographs: steps of a small residual network that the tower then learns from, on augmented images",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    limit_threads()
    from examples.pretrain.backbones import make_backbones

    make_backbones(options)


if __name__ == "__main__":
    run(main)
