"""Caption a folder or a parquet file of images on a Ray cluster: `mmllm caption` as a Ray Data map.

    pip install "ray[data]"
    python -m examples.caption_with_ray photos --model outputs/full/best_model --out captions --workers 2
    python -m examples.caption_with_ray images.parquet --column image --model DIR --out captions --workers 8 --gpus 1

Each worker loads the model once and captions batches of images; a folder must be readable by all of them. Ray starts a
worker that dies again and repeats its batch. The rows are JSON lines in the files of `--out`, an image that cannot be
used as a row with its error. https://docs.ray.io/en/latest/data/batch_inference.html
"""

import argparse
from pathlib import Path

import ray

from mmllm.commands import add_generation_options, generation_config
from mmllm.commands.caption import find_images


class Captioner:
    """What runs in a worker: a batch {"name", "image"} becomes {"image", "caption", "error"}."""

    def __init__(self, options: argparse.Namespace):
        from mmllm.inference.pipeline import load_pipeline

        self.options, self.config = options, generation_config(options)
        device = "cuda" if options.gpus else "cpu"
        self.pipeline = load_pipeline(options.model, device=device, dtype=options.dtype, dtype_on_cpu="int8")

    def __call__(self, batch: dict) -> dict:
        from mmllm.inference.captioner import answer_images

        images = [(str(name), value) for name, value in zip(batch["name"], batch["image"], strict=True)]
        slots = 64 if self.options.gpus else 8
        rows = list(answer_images(self.pipeline, images, [self.options.prompt], self.config, slots=slots))
        return {
            "image": [row.image for row in rows],
            "caption": [row.answer for row in rows],
            "error": [row.error for row in rows],
        }


def read(source: str, column: str) -> ray.data.Dataset:
    """Rows {"name", "image"}: paths of a folder, or the encoded bytes of a parquet file of Hugging Face."""
    if not source.endswith(".parquet"):
        folder, names = find_images(Path(source), None)
        return ray.data.from_items([{"name": name, "image": str(folder.resolve() / name)} for name in names])

    def row(values: dict) -> dict:
        image = values[column]
        is_struct = isinstance(image, dict)
        return {"name": (is_struct and image.get("path")) or "", "image": image["bytes"] if is_struct else image}

    return ray.data.read_parquet(source).map(row)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="FOLDER|FILE.parquet")
    parser.add_argument("--model", required=True, metavar="DIR", help="a path that every worker can read")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder of the rows, one file per block")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, metavar="G", help="per worker (default: 0, the CPU)")
    parser.add_argument("--cpus", type=float, default=1, metavar="C", help="per worker (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--column", default="image", help="of the parquet file (default: %(default)s)")
    parser.add_argument("--prompt", default="Describe this image.", help="(default: %(default)s)")
    parser.add_argument("--dtype", help="(default: int8 on a CPU, bfloat16 on a GPU)")
    add_generation_options(parser)
    options = parser.parse_args(arguments)
    options.model = str(Path(options.model).resolve())
    captions = read(options.images, options.column).map_batches(
        Captioner,
        fn_constructor_args=(options,),
        batch_size=options.batch_size,
        concurrency=options.workers,
        num_gpus=options.gpus,
        num_cpus=options.cpus,
    )
    captions.write_json(str(Path(options.out).resolve()))


if __name__ == "__main__":
    main()
