"""Caption a folder of images, or answer questions about each of them.

mmllm caption photos --out captions.jsonl                         # or .csv; run it again to continue
mmllm caption photos --out beside                                 # x.txt beside each x.jpg
mmllm caption list.txt --out answers.csv --questions questions.txt
torchrun --nproc_per_node=4 -m mmllm caption photos --out captions.jsonl

Images that are in the output already are skipped. An image that cannot be used gets a row with its error.
"""

import argparse
import mimetypes
from pathlib import Path

from mmllm.commands import add_generation_options, add_model_options, at_least_one, generation_config, make_parser
from mmllm.errors import UserError
from mmllm.runtime.console import progress, stderr, stderr_rank0

BESIDE = "beside"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("caption", __doc__)
    add = parser.add_argument
    add("images", type=Path, metavar="FOLDER|LIST", help="a folder, or a text file with one image a line")
    add("--out", type=output, required=True, metavar="FILE", help=f"a .jsonl or .csv file, or {BESIDE!r}")
    add_model_options(parser)
    add("--prompt", default="Describe this image.", help="what to ask (default: %(default)s)")
    add("--questions", type=Path, metavar="FILE", help="ask each line of FILE about each image instead")
    add("--image-dir", type=Path, metavar="DIR", help="of the names in LIST (default: the folder of LIST)")
    add("--slots", type=at_least_one, metavar="N", help="images side by side (default: 8, on a GPU 64)")
    add("--num-workers", type=at_least_one, default=2, metavar="N", help="threads that decode images")
    add("--logprobs", action="store_true", help="add each answer's confidence, from 0 to 1")
    add_generation_options(parser)
    options = parser.parse_args(arguments)
    if options.out == BESIDE and options.questions:
        parser.error(f"--out {BESIDE} holds one caption an image; for --questions name a .jsonl or .csv file")
    return options


def output(text: str) -> Path | str:
    if text == BESIDE or Path(text).suffix in (".jsonl", ".csv"):
        return text if text == BESIDE else Path(text)
    raise argparse.ArgumentTypeError(f"{text}: name a .jsonl or .csv file, or {BESIDE!r} for a .txt beside each image")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    folder, names = find_images(options.images, options.image_dir)
    questions = read_lines(options.questions) if options.questions else [options.prompt]
    # torch takes two seconds to import: only now that the command line and its files are known to be right
    from mmllm.runtime.distributed import World

    with World.start(options.device) as world:
        return caption(options, folder, names, questions, world)


def caption(options: argparse.Namespace, folder: Path, names: list[str], questions: list[str], world) -> int:
    """Write the rows that are missing, each process of torchrun those of its share of the images. The exit code."""
    from mmllm.inference.captioner import RowFile, TextFiles, answer_images, merge, part_of

    if is_beside := options.out == BESIDE:
        out = TextFiles(folder)
        done = {name for name in names if out.is_done(name)}
    else:
        columns = len(questions) if options.questions else 0
        done = world.on_rank0(lambda: merge(options.out, names, columns))
        out = RowFile(options.out if world.is_first else part_of(options.out, world.rank), bool(options.questions))
    todo = [name for name in names if name not in done]
    stderr_rank0(f"{len(names)} images, {len(names) - len(todo)} of them done before")
    failed = 0
    if mine := todo[world.rank :: world.size]:
        pipeline, config, slots = load(options, str(world.device))
        files = [(name, folder / name) for name in mine]
        rows = answer_images(pipeline, files, questions, config, slots=slots, num_workers=options.num_workers)
        for row in progress(rows, len(mine) * len(questions), "answers" if options.questions else "captions"):
            out.write(row)
            if row.error:
                failed += 1
                stderr(f"error: {row.error}")
    out.close()
    failed = int(world.sum([failed])[0])  # waits for the other processes
    if not is_beside:
        world.on_rank0(lambda: merge(options.out, names, columns))
    stderr_rank0(f"{options.out}: {len(todo)} more" + (f", {failed} rows with an error" if failed else ""))
    return 1 if failed else 0


def load(options: argparse.Namespace, device: str):
    """The pipeline, how it decodes, and the number of images side by side."""
    from mmllm.inference.pipeline import load_pipeline

    is_cpu = device == "cpu"
    pipeline = load_pipeline(options.model, device=device, dtype=options.dtype, dtype_on_cpu="int8")
    return pipeline, generation_config(options), options.slots or (8 if is_cpu else 64)


def find_images(source: Path, image_dir: Path | None) -> tuple[Path, list[str]]:
    """The folder of the images and their names in it: sorted, or in the order of a list."""
    if source.is_dir():
        names = [path.relative_to(source) for path in source.rglob("*") if is_image(path)]
        if not names:
            raise UserError(
                f"{source}: no image files in this folder; name another one, or a text file with one image a line"
            )
        return source, sorted(map(str, names))
    folder = image_dir or source.parent
    return folder, list(dict.fromkeys(read_lines(source)))


def is_image(path: Path) -> bool:
    """By the name: what is in the file shows when it is read."""
    kind = mimetypes.guess_type(path.name)[0] or ""
    return kind.startswith("image/") and not path.name.startswith(".") and path.is_file()


def read_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); name a folder, or a text file in UTF-8") from error
    if not any(lines):
        raise UserError(f"{path}: has no line of text")
    return [line for line in lines if line]
