"""`mmllm NAME ...`, or `python -m mmllm NAME ...` from a checkout."""

import difflib
import sys
from importlib import import_module

from mmllm import __version__
from mmllm.errors import UserError, run
from mmllm.runtime.threads import limit_threads

COMMANDS = {
    "prepare": "check a data set, split it and write it in our own format",
    "train": "train a model in two stages on images with text",
    "sample": "ask a model about images",
    "caption": "caption a folder of images, or ask questions about each",
    "serve": "serve a model over HTTP",
    "convert": "join a CLIP and a Qwen2.5 model, or give a model another form",
    "info": "show what a model directory or a published model holds",
    "verify": "check official files against published checksums and figures",
    "push": "upload a model with a model card to the Hugging Face hub",
    "evaluate": "score a model on captions and questions",
    "compare": "compare two to four runs: settings, numbers, curves",
    "preview": "show what a data file trains on",
}


def main(arguments: list[str]) -> int | None:
    name, *arguments = arguments or ["--help"]
    if name in ("-h", "--help"):
        print("usage: mmllm COMMAND ...   (mmllm COMMAND --help shows its options)\n")
        print("\n".join(f"  {command:10} {summary}" for command, summary in COMMANDS.items()))
        return 0
    if name == "--version":
        print(f"mmllm {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"unknown command {name!r}; " + (f"did you mean {near[0]}?" if near else "see mmllm --help"))
    limit_threads()  # before the command imports torch
    return import_module(f"mmllm.commands.{name}").main(arguments)


def start(*before: str) -> None:
    """Run the command line with the arguments `before` in front of it, which is how a script names its command."""
    run(lambda: main([*before, *sys.argv[1:]]))


if __name__ == "__main__":
    start()
