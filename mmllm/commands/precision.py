"""Measure how far the answers of a model move in each precision.

mmllm precision --model outputs/full/best_model --data val.json --image-dir images

One JSON line for each precision: relative error of the logits, Kullback-Leibler divergence from float32 (nats a token),
share of positions where the likeliest token is the same, and the loss.
"""

import json

from mmllm.commands import add_data_options, at_least_one, make_parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("precision", __doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="a model directory with float weights")
    add_data_options(parser)
    parser.add_argument("--limit", type=at_least_one, default=32, metavar="N", help="(default: the first %(default)s)")
    options = parser.parse_args(arguments)
    from mmllm.data.batches import make_batch, read_row
    from mmllm.data.samples import load_samples
    from mmllm.evaluation.precision import compare
    from mmllm.models.multimodal import MultimodalLLM

    processor = MultimodalLLM.from_pretrained(options.model, dtype=None).processor
    samples = load_samples(options.data, options.image_dir)[: options.limit]
    batches = [make_batch([read_row(sample, processor)], processor) for sample in samples]
    for row in compare(options.model, batches):
        print(json.dumps(row))
