"""Ask a trained model about pictures.

python sample.py --image x.jpg                                 # a caption
python sample.py --image a.jpg b.jpg --prompt "What is this?"   # one answer a picture
python sample.py --image x.jpg --chat                          # a conversation; an empty line ends it
"""

import argparse
import sys

from mmllm.config.schema import PRECISIONS
from mmllm.errors import ImageError, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures, one answer each")
    parser.add_argument("--prompt", default="Describe this image.", help="what to ask (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="talk about the pictures; reads lines from the terminal")
    parser.add_argument(
        "--model", metavar="DIR", help="model directory or hub name (default: the newest under outputs/)"
    )
    parser.add_argument("--max-new-tokens", type=at_least_one, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (default)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off (default)")
    parser.add_argument("--num-beams", type=at_least_one, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="L", help="of beams (default: %(default)s)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer before it; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=PRECISIONS, help="(default: bfloat16 on CUDA, else float32; see the README)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the step (on a GPU, or in float32); pays in long talks"
    )
    options = parser.parse_args(arguments)
    if not options.image and not options.chat:
        parser.error("name a picture with --image FILE, or talk without one with --chat")
    return options


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least 1")
    return number


def main() -> int:
    options = parse()
    # torch takes two seconds to import: only now that the command line is known to be right
    from mmllm.inference.pipeline import load_pipeline
    from mmllm.inference.sampling import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        stop=tuple(options.stop),
        seed=options.seed,
    )
    pipeline = load_pipeline(options.model, device=options.device, dtype=options.dtype, is_compiled=options.compile)
    return chat(pipeline, options, config) if options.chat else answer_each(pipeline, options, config)


def answer_each(pipeline, options: argparse.Namespace, config) -> int:
    """One answer per picture; a bad picture is reported and the others still get theirs."""
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
    """Reads questions until an empty line or the end of input; the pictures come with the first one."""
    from mmllm.data.chat import assistant, user

    pixels = [pipeline.processor.image_processor(path) for path in options.image]
    messages = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            text = ""
        if not text:
            return 0
        messages.append(user(text, images=0 if messages else len(pixels)))
        answer = pipeline.generate(pipeline.prompt(messages, pixels), config, on_text=write)
        print()
        messages.append(assistant(answer.text))


def write(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    run(main)
