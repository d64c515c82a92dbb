"""Images per minute of `mmllm caption` beside one image at a time with the same model, on random weights.

Both decode the same JPEG files and generate the same number of tokens an image; they take turns, and the row has the
median of the rounds.
"""

import statistics
import time
from pathlib import Path

from benchmarks.random_model import sizes, write_model
from benchmarks.rehearse import write_samples
from benchmarks.rows import Goal
from mmllm.inference.captioner import answer_images
from mmllm.inference.pipeline import MultimodalInferencePipeline, load_pipeline
from mmllm.inference.request import GenerationConfig
from mmllm.runtime.console import print_rank0

PROMPT = "Describe this image."
TOGETHER, ONE = "mmllm caption", "one at a time"
GOALS = (
    Goal("caption", "cpu", "int8-dynamic, images/minute against one at a time in int8", "images_per_minute",
         ("int8-dynamic", TOGETHER), 3.0, ("int8", ONE)),
)  # fmt: skip


def measure(
    spec: dict, precisions: list[str], images: int, new_tokens: int, slots: int, rounds: int, folder: Path
) -> list[dict]:
    """Two rows for each precision."""
    model = write_model(
        folder / f"{spec['size']}-{spec['layers'] or 'all'}-layers" / "model", sizes(spec["size"], spec["layers"])
    )
    write_samples(folder / "samples", images, 480)
    files = [(f"{i}.jpg", folder / "samples" / "images" / f"{i}.jpg") for i in range(images)]
    config = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    rows = []
    for precision in precisions:
        pipeline = load_pipeline(model, device=spec["device"], dtype=precision)
        seconds: dict[str, list[float]] = {ONE: [], TOGETHER: []}
        for number in range(rounds + 1):  # the first round is not counted
            for name in seconds:
                begin = time.perf_counter()
                caption(pipeline, files, config, slots if name == TOGETHER else 1)
                if number:
                    seconds[name].append(time.perf_counter() - begin)
        for name, measured in seconds.items():
            rate = 60 * images / statistics.median(measured)
            rows.append(
                {"case": precision, "contestant": name, "rows": slots if name == TOGETHER else 1, "images": images,
                 "new_tokens": new_tokens, "images_per_minute": rate, "seconds": measured}
            )  # fmt: skip
            print_rank0(f"{precision}, {name}: {rate:.1f} images a minute")
    return rows


def caption(pipeline: MultimodalInferencePipeline, files: list, config: GenerationConfig, slots: int) -> None:
    if slots == 1:
        pipeline.engine.store.clear()  # nothing of an earlier round is reused, as in a new `mmllm caption`
        for _, path in files:
            pipeline.caption_image(path, PROMPT, config)
    else:
        assert all(not row.error for row in answer_images(pipeline, files, [PROMPT], config, slots=slots))
