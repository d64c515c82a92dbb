"""Ask a trained model about images.

mmllm sample --image x.jpg                                  # a caption
mmllm sample --image a.jpg b.jpg --prompt "What is this?"   # one answer for each image
mmllm sample --image x.jpg --chat                           # a conversation; an empty line ends it
"""

import argparse
import sys

from mmllm.commands import add_generation_options, add_model_options, generation_config, make_parser
from mmllm.errors import ImageError, UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("sample", __doc__)
    add_model_options(parser)
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="images, one answer each")
    parser.add_argument("--prompt", default="Describe this image.", help="what to ask (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="talk about the images; reads lines from the terminal")
    add_generation_options(parser)
    options = parser.parse_args(arguments)
    if not options.image and not options.chat:
        parser.error("name an image with --image FILE, or talk without one with --chat")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # torch takes two seconds to import: only now that the command line is known to be right
    from mmllm.inference.pipeline import load_pipeline

    config = generation_config(options)
    pipeline = load_pipeline(options.model, device=options.device, dtype=options.dtype)
    return chat(pipeline, options, config) if options.chat else answer_each(pipeline, options, config)


def answer_each(pipeline, options: argparse.Namespace, config) -> int:
    """Print one answer for each image; a bad image is reported and the others are still answered."""
    from mmllm.data.chat import user

    failed = 0
    for path in options.image:
        try:
            prompt = pipeline.prompt([user(options.prompt, images=1)], [path])
        except ImageError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        if len(options.image) > 1:
            print(f"{path}: ", end="", flush=True)
        pipeline.generate(prompt, config, on_text=write)
        print()
    if failed == 1 == len(options.image):
        return 2  # the only input was bad
    return 1 if failed else 0


def chat(pipeline, options: argparse.Namespace, config) -> int:
    """Read questions until an empty line or the end of input; the images come with the first one."""
    from mmllm.data.chat import assistant, user

    pixels = [pipeline.processor.image_processor(path) for path in options.image]
    messages = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            text = ""
        except UnicodeDecodeError as error:
            raise UserError("the question is not Unicode; write it as UTF-8") from error
        if not text:
            return 0
        messages.append(user(text, images=0 if messages else len(pixels)))
        answer = pipeline.generate(pipeline.prompt(messages, pixels), config, on_text=write)
        print()
        messages.append(assistant(answer.text))


def write(piece: str) -> None:
    print(piece, end="", flush=True)
