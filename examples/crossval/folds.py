"""The folds: train, caption what was not trained on, score everything once."""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from examples.crossval.caption_space import noisy
from examples.crossval.language_model import make_language_model, trained, write_run
from examples.crossval.table import Captions, copied, deal, read_captions, read_features, standardised
from mmllm.config.schema import ExperimentConfig
from mmllm.config.sources import resolve
from mmllm.data.chat import user
from mmllm.data.records import CAPTION_PROMPT
from mmllm.errors import DataError, UserError
from mmllm.evaluation.captions import best_constant_caption
from mmllm.evaluation.evaluator import MultimodalEvaluator
from mmllm.evaluation.predictions import MEND
from mmllm.evaluation.results import table
from mmllm.inference.engine import generate
from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig, Prompt
from mmllm.runtime.console import duration, print_rank0
from mmllm.runtime.files import write_json, writing

VALIDATION_SHARE = 0.1  # of a fold's training images
BATCH_SIZE = 32  # prompts


def cross_validate(options: argparse.Namespace) -> None:
    config, _ = resolve(options.config, os.environ, options.settings)
    out = Path(options.out)
    with writing(out, MEND, UserError):
        out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    features, captions = read_features(options.features), read_captions(options.captions)
    names = [name for name in features if name in captions]
    if len(names) < 2 * options.folds:
        raise DataError(f"{len(names)} images of {options.features} have captions in {options.captions}; too few")
    others = {name: texts for name, texts in captions.items() if name not in features}
    print_rank0(f"{len(names)} images in {options.folds} folds; {len(others)} more have captions alone")
    if options.qwen is None and not others:
        raise UserError("no captions are left to pretrain a language model on; name one that has seen none: --qwen DIR")
    config.model.qwen = options.qwen or str(make_language_model(out / "language", others, config, options))

    said: dict[str, dict[str, str]] = {}
    for number, tested in enumerate(deal(names, options.folds, config.seed), 1):
        print_rank0(f"fold {number} of {options.folds}")
        training = [name for name in names if name not in set(tested)]
        known = standardised(features, training)
        texts = {name: captions[name] for name in training}
        validation = training[:: round(1 / VALIDATION_SHARE)]
        texts, seen = with_noise(texts, known, validation, options)
        run = write_run(out / f"fold{number}", texts, seen, validation, config)
        rows = by_the_model(trained(run), [known[name] for name in tested], options, config.device)
        rows |= copied(features, captions, tested, training)
        for row, answers in rows.items():
            said[row] = said.get(row, {}) | dict(zip(tested, answers, strict=True))
    report(out, said, captions, names, options, config, time.perf_counter() - began)


def with_noise(
    texts: Captions, features: dict[str, Tensor], validation: list[str], options: argparse.Namespace
) -> tuple[Captions, dict[str, Tensor]]:
    """The captions and embeddings of the `validation` images, and of the other images many copies with noise."""
    said, seen = {name: texts[name] for name in validation}, {name: features[name] for name in validation}
    for name in [name for name in texts if name not in said]:
        for copy in range(options.copies):
            said[f"{name}#{copy}"] = texts[name]
            seen[f"{name}#{copy}"] = noisy(features[name], len(seen), options.noise)
    return said, seen


def by_the_model(model: Path, images: list[Tensor], options: argparse.Namespace, device: str) -> dict[str, list[str]]:
    """What the model says of each embedding: by beam search, greedily, and when it is shown that of another image."""
    greedy = GenerationConfig(max_new_tokens=options.max_new_tokens)
    beams = replace(greedy, num_beams=options.num_beams)
    return {
        f"{options.num_beams} beams": say_captions(model, images, beams, device),
        "greedy": say_captions(model, images, greedy, device),
        "other images": say_captions(model, images[1:] + images[:1], greedy, device),
    }


def say_captions(model: Path, images: list[Tensor], config: GenerationConfig, device: str) -> list[str]:
    """The caption of each embedding."""
    pipeline = load_pipeline(model, device=device, dtype="float32")
    ids = tuple(pipeline.processor.encode_prompt([user(CAPTION_PROMPT, images=1)]))
    prompts = [Prompt(ids, image_F.view(1, 1, -1)) for image_F in images]
    said = []
    for start in range(0, len(prompts), BATCH_SIZE):
        said += [
            answer.text.strip() for answer in generate(pipeline.model, prompts[start : start + BATCH_SIZE], config)
        ]
    return said


def report(
    out: Path,
    said: dict[str, dict[str, str]],
    captions: Captions,
    names: list[str],
    options: argparse.Namespace,
    config: ExperimentConfig,
    seconds: float,
) -> None:
    """Scores what was said of each image, prints the table and writes captions.json and scores.json."""
    references = [captions[name] for name in names]
    said["best constant"] = dict.fromkeys(names, best_constant_caption(references))
    evaluator = MultimodalEvaluator(meteor=False)
    scores = {}
    for row, texts in said.items():
        measured = evaluator.evaluate_captioning([texts[name] for name in names], references)
        scores[row] = {"captions": {"count": len(names)} | measured}
    about = {"options": vars(options), "config": config.to_dict(), "seconds": round(seconds, 1)}
    write_json(out / "scores.json", about | {"scores": scores})
    write_json(out / "captions.json", said)
    print_rank0("\n".join(table(scores)))
    print_rank0(f"{duration(seconds)}; captions.json and scores.json in {out}")
