"""Cross-validation of the one-token model on a table of image embeddings, beside what needs no training.

    python -m examples.crossval --features clip_embeddings.npz --captions captions.jsonl

For images whose embeddings are known though the encoder that made them is not at hand. They are dealt into folds. For
each fold both stages are trained on the other images, by the trainer that trains everything else, and the fold is
captioned; all captions together are scored once. Beside them stand the same models with the embeddings of other images,
the caption of the nearest training image, the caption most like all those of the nearest ten, and the best constant.

No caption leaks: the small language model is pretrained on the captions of images outside the table (language_model.py),
which no fold tests, and a tenth of a fold's training images chooses its checkpoint.

Copying is hard to beat: a caption chosen among those of ten neighbors was written by a person.
Consensus of neighbors: https://arxiv.org/abs/1505.04467.
"""

import argparse

from mmllm.commands import at_least_one
from mmllm.errors import run
from mmllm.runtime.threads import limit_threads


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.crossval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = "(default: %(default)s)"
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the configuration")
    parser.add_argument("--config", default="configs/crossval.py", metavar="FILE", help=shown)
    parser.add_argument("--features", required=True, metavar="FILE", help="embeddings by image: .safetensors or .npz")
    parser.add_argument("--captions", required=True, metavar="FILE", help="captions, in any supported format")
    parser.add_argument("--out", default="outputs/crossval", metavar="DIR", help=shown)
    parser.add_argument("--folds", type=at_least_one, default=5, metavar="N", help=shown)
    parser.add_argument("--num-beams", type=at_least_one, default=5, metavar="N", help=shown)
    parser.add_argument("--max-new-tokens", type=at_least_one, default=30, metavar="N", help=shown)
    parser.add_argument("--copies", type=at_least_one, default=20, metavar="N", help=f"of a training image {shown}")
    parser.add_argument("--noise", type=float, default=1.0, metavar="STD", help=f"of each number of a copy {shown}")
    parser.add_argument("--qwen", metavar="DIR", help="a language model, in place of the one made from captions")
    parser.add_argument("--width", type=int, default=192, metavar="N", help=f"of the language model {shown}")
    parser.add_argument("--layers", type=at_least_one, default=3, metavar="N", help=shown)
    parser.add_argument("--vocab-size", type=at_least_one, default=2000, metavar="N", help=shown)
    parser.add_argument("--caption-features", type=at_least_one, default=128, metavar="N", help=shown)
    parser.add_argument("--text-epochs", type=at_least_one, default=4, metavar="N", help=shown)
    parser.add_argument("--text-rate", type=float, default=3e-3, metavar="RATE", help=shown)
    return parser.parse_intermixed_args(arguments)  # settings may stand anywhere


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    limit_threads()
    from examples.crossval.folds import cross_validate

    cross_validate(options)


if __name__ == "__main__":
    run(main)
