"""Show what a data file trains on: the first samples as the model reads them, targets in green or [brackets].

mmllm preview --data train.json --model models/start
"""

import sys

from mmllm.commands import add_data_options, at_least_one, make_parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("preview", __doc__)
    add_data_options(parser)
    parser.add_argument("--model", required=True, metavar="DIR", help="the model directory that will be trained")
    parser.add_argument("--max-length", type=at_least_one, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--limit", type=at_least_one, default=3, metavar="N", help="(default: the first %(default)s)")
    parser.add_argument("--no-share", action="store_true", help="each text in its own row (data.share_images=false)")
    options = parser.parse_args(arguments)
    from mmllm.data.chat import IGNORED, mark_targets
    from mmllm.data.packing import encode_shared
    from mmllm.data.processor_files import load_processor
    from mmllm.data.samples import load_samples, share_images
    from mmllm.models.loading import read_info

    info = read_info(options.model)
    processor = load_processor(options.model, info.config.num_image_tokens, info.system_prompt)
    marks = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    samples = load_samples(options.data, options.image_dir)
    for sample in (samples if options.no_share else share_images(samples))[: options.limit]:
        for encoded in encode_shared(sample, processor, options.max_length):
            targets = sum(label != IGNORED for label in encoded.labels)
            texts = f" of {encoded.segment_ids[-1]} texts in one row" if encoded.segment_ids else ""
            images = ", ".join(map(str, sample.images))
            print(f"--- {sample.id}: {len(encoded.ids)} tokens{texts}, {targets} trained on, images: {images}")
            print(mark_targets(encoded, processor, *marks))
