"""Cross-validation of the one-token model on a table of image embeddings, beside what needs no training.

    python -m examples.crossval.crossval --features clip_embeddings.npz --captions captions.jsonl

For pictures whose embeddings are known though the encoder that made them is not at hand. They are dealt into folds; for
each fold both stages are trained on the other pictures, by the trainer that trains everything else, and the fold is
captioned; all captions together are scored once. Beside them stand the same models shown the embeddings of other
pictures, the caption of the nearest training picture, the caption most like all those of the nearest ten, and the best
constant.

No caption leaks: the small language model is pretrained on the captions of pictures outside the table (standins.py),
which no fold tests, and a tenth of a fold's training pictures chooses its checkpoint.

The surprising fact: copying is hard to beat. A caption chosen among those of ten neighbours was written by a person.

Consensus of neighbours: https://arxiv.org/abs/1505.04467. N pictures, F numbers of an embedding. Next: toy.py.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.crossval.caption_space import CaptionSpace, each_by_the_others, noisy
from examples.pretrain.pretrain import build_tokenizer, initialise_, write_clip, write_qwen
from mmllm.commands import at_least_one
from mmllm.config.schema import ExperimentConfig, resolve
from mmllm.data.batches import sample_order
from mmllm.data.chat import user
from mmllm.data.image import ImageProcessor
from mmllm.data.samples import CAPTION_PROMPT, load_samples
from mmllm.errors import DataError, UserError, run
from mmllm.evaluation.captions import best_constant_caption, ngrams, weighted
from mmllm.evaluation.evaluator import MultimodalEvaluator
from mmllm.evaluation.ptb import words
from mmllm.evaluation.results import make_directory, table, write_results
from mmllm.inference.generate import generate
from mmllm.inference.pipeline import load_pipeline
from mmllm.inference.request import GenerationConfig, Prompt
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen import Qwen2
from mmllm.runtime.console import duration, print_rank0
from mmllm.training.experiment import train

Captions = dict[str, tuple[str, ...]]  # by picture name

NEIGHBOURS = 10
VALIDATION_SHARE = 0.1  # of a fold's training pictures
AT_ONCE = 32  # prompts in one batch of decoding


# The table ------------------------------------------------------------------------------------------------------------


def read_features(path: str | Path) -> dict[str, Tensor]:
    """Embeddings (F,) in float32 by the name of their picture: of a .safetensors file with a tensor a picture, or of an
    .npz file with `names` (N,) and `embeddings` (N, F)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such table of embeddings")
    if path.suffix == ".npz":
        with np.load(path) as content:
            if not {"names", "embeddings"} <= set(content):
                raise DataError(f"{path}: holds {', '.join(content)}; `names` and `embeddings` are needed")
            rows_NF = torch.from_numpy(content["embeddings"]).float()
            features = dict(zip(map(str, content["names"]), rows_NF, strict=True))
    else:
        try:
            features = {name: tensor.float().flatten() for name, tensor in load_file(path).items()}
        except SafetensorError as error:
            raise DataError(f"{path}: cannot be read as safetensors ({error}); tables are that or .npz") from error
    lengths = {len(row) for row in features.values()}
    if len(lengths) != 1:
        raise DataError(
            f"{path}: embeddings of {sorted(lengths)} numbers; all must have as many, and there must be some"
        )
    return features


def read_captions(path: str | Path) -> Captions:
    """The captions of each picture by its file name, from a data file in any supported format, as the words that scores
    count: capitals and full stops are as people happened to write them, and cost a small model much."""
    samples = [sample for sample in load_samples(path) if len(sample.images) == 1]
    found = {sample.images[0].name: sample.references for sample in samples}
    plain = {name: tuple(text for text in map(words, texts) if text) for name, texts in found.items()}
    return {name: texts for name, texts in plain.items() if texts}


def deal(names: Sequence[str], folds: int, seed: int) -> list[list[str]]:
    """`names` in mixed order, dealt like cards into `folds` parts."""
    order = sample_order(len(names), seed, 0)
    return [[names[i] for i in order[fold::folds]] for fold in range(folds)]


# What needs no training -----------------------------------------------------------------------------------------------


def nearest(query_F: Tensor, others: dict[str, Tensor], count: int) -> list[str]:
    """The names of the `count` embeddings with the highest cosine to `query_F`, the best first."""
    names = list(others)
    cosines_N = F.cosine_similarity(query_F[None], torch.stack(list(others.values())))
    return [names[i] for i in cosines_N.argsort(descending=True, stable=True)[:count].tolist()]


def consensus(texts: Sequence[str], pictures_with: Counter, num_pictures: int) -> str:
    """The one of `texts` that is most like all of them, in CIDEr's n-grams and weights."""
    vectors = [weighted(ngrams(words(text)), pictures_with, num_pictures) for text in texts]
    together = Counter()
    for vector in vectors:
        for gram, weight in vector.items():
            together[gram] += weight
    likeness = [sum(weight * together[gram] for gram, weight in vector.items()) for vector in vectors]
    return texts[max(range(len(texts)), key=likeness.__getitem__)]


def copied(features: dict[str, Tensor], captions: Captions, tested: list[str], training: list[str]) -> list[list[str]]:
    """What the neighbours say of each `tested` picture: the first caption of the nearest, and their consensus."""
    known = {name: features[name] for name in training}
    pictures_with = Counter(
        gram for name in training for gram in set().union(*(ngrams(words(text)) for text in captions[name]))
    )
    firsts, agreed = [], []
    for name in tested:
        near = nearest(features[name], known, NEIGHBOURS)
        firsts.append(captions[near[0]][0])
        agreed.append(consensus([text for other in near for text in captions[other]], pictures_with, len(training)))
    return [firsts, agreed]


# The language model ---------------------------------------------------------------------------------------------------


def write_tower(folder: Path, num_features: int) -> Path:
    """A vision tower that nobody asks, so that the model has its usual files."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=32,
        patch_size=32,
        projection_dim=num_features,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_clip(folder, CLIPVisionTower(config, with_projection=True), ImageProcessor(32))
    return folder


def write_run(
    folder: Path, captions: Captions, features: dict[str, Tensor], validation: list[str], config: ExperimentConfig
) -> ExperimentConfig:
    """Writes the data of a run into `folder`; returns its configuration, with the run's own directory beside them."""
    make_directory(folder)
    files = {"train": folder / "train.jsonl", "val": folder / "val.jsonl"}
    parts = {"train": [name for name in captions if name not in set(validation)], "val": validation}
    for part, file in files.items():
        rows = [{"image": name, "captions": list(captions[name])} for name in parts[part]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_file({name: features[name].contiguous() for name in captions}, folder / "features.safetensors")
    num_features = len(next(iter(features.values())))
    return replace(
        config,
        experiment_name="run",
        output_dir=str(folder),
        model=replace(config.model, clip=str(write_tower(folder / "clip", num_features)), features="pooled"),
        data=replace(
            config.data,
            train_data_path=str(files["train"]),
            val_data_path=str(files["val"]),
            features_path=str(folder / "features.safetensors"),
        ),
    )


def trained(config: ExperimentConfig) -> Path:
    """The best model of a finished run; ends the program where a signal stopped it."""
    code = train(config, overwrite=True)
    if code:
        sys.exit(code)
    return Path(config.output_dir) / config.experiment_name / "best_model"


def make_language_model(out: Path, captions: Captions, config: ExperimentConfig, options: argparse.Namespace) -> Path:
    """Trains a small Qwen2 on `captions` alone, an embedding of the others standing for the picture of each.

    One epoch over as many copies as `--text-epochs` says: so the noise is another each time.
    """
    space = CaptionSpace(list(captions.values()), options.standin_numbers)
    features, said = {}, {}
    for name, texts in captions.items():
        for number, (others, text) in enumerate(each_by_the_others(texts)):
            embedding_F = space(others)
            for copy in range(options.text_epochs):
                features[f"{name}#{number}.{copy}"] = noisy(embedding_F, len(said))
                said[f"{name}#{number}.{copy}"] = (text,)
    if not said:
        raise DataError(f"{options.captions}: no picture has two captions, of which one could stand for it")
    texts = [text for of_one in captions.values() for text in of_one]
    template = ["system\n", "user\n", "assistant\n", CAPTION_PROMPT, config.model.system_prompt]
    tokenizer = build_tokenizer(texts + template * RARELY_CUT, options.vocab_size)
    lm = Qwen2(
        Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 32,
            num_key_value_heads=options.width // 64,
            head_dim=32,
            rope_theta=1e4,
            max_position_embeddings=1024,
        )
    )
    initialise_(lm, config.seed)
    write_qwen(out / "qwen", lm, tokenizer)
    validation = sorted(said)[:: max(10, len(said) // 200)]
    config = write_run(out, said, features, validation, config)
    config.model.qwen = str(out / "qwen")
    config.data.batch_size *= TEXTS_PER_PICTURE
    config.training = replace(
        config.training,
        stage1=replace(config.training.stage1, epochs=0),
        stage2=replace(config.training.stage2, epochs=1, learning_rate=options.text_rate),
    )
    write_qwen(out / "qwen", MultimodalLLM.from_pretrained(trained(config)).language_model, tokenizer)
    return out / "qwen"


TEXTS_PER_PICTURE = 4  # captions in a step of the language model, for each picture in one of the folds
RARELY_CUT = (
    1000  # times the words of the chat template are shown to the tokenizer, which then makes few tokens of them
)


# The folds ------------------------------------------------------------------------------------------------------------


def standardised(features: dict[str, Tensor], training: Sequence[str]) -> dict[str, Tensor]:
    """Every number of the embeddings with mean 0 and deviation 1 over the `training` pictures: those of CLIP have unit
    length, and a new projector would take long to tell them apart."""
    rows_NF = torch.stack([features[name] for name in training])
    mean_F, deviation_F = rows_NF.mean(0), rows_NF.std(0).clamp(min=1e-6)
    return {name: (row_F - mean_F) / deviation_F for name, row_F in features.items()}


def say_captions(model: Path, pictures: list[Tensor], config: GenerationConfig, device: str) -> list[str]:
    """What the model says of each embedding."""
    pipeline = load_pipeline(model, device=device, dtype="float32")
    ids = tuple(pipeline.processor.encode_prompt([user(CAPTION_PROMPT, images=1)]))
    prompts = [Prompt(ids, picture_F.view(1, 1, -1)) for picture_F in pictures]
    said = []
    for start in range(0, len(prompts), AT_ONCE):
        said += [answer.text.strip() for answer in generate(pipeline.model, prompts[start : start + AT_ONCE], config)]
    return said


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    config, _ = resolve(options.config, os.environ, options.settings)
    out = Path(options.out)
    make_directory(out)
    began = time.perf_counter()
    features, captions = read_features(options.features), read_captions(options.captions)
    names = [name for name in features if name in captions]
    if len(names) < 2 * options.folds:
        raise DataError(f"{len(names)} pictures of {options.features} have captions in {options.captions}; too few")
    others = {name: texts for name, texts in captions.items() if name not in features}
    print_rank0(f"{len(names)} pictures in {options.folds} folds; {len(others)} more have captions alone")
    if options.qwen is None and not others:
        raise UserError("no captions are left to pretrain a language model on; name one that has seen none: --qwen DIR")
    config.model.qwen = options.qwen or str(make_language_model(out / "language", others, config, options))

    greedy = GenerationConfig(max_new_tokens=options.max_new_tokens)
    beams = replace(greedy, num_beams=options.num_beams)
    rows = [f"{options.num_beams} beams", "greedy", "other pictures", f"{NEIGHBOURS} neighbours", "nearest"]
    said: dict[str, dict[str, str]] = {row: {} for row in rows}
    for number, tested in enumerate(deal(names, options.folds, config.seed)):
        training = [name for name in names if name not in set(tested)]
        print_rank0(f"fold {number + 1} of {options.folds}")
        known = standardised(features, training)
        chosen = training[:: round(1 / VALIDATION_SHARE)]
        folder = out / f"fold{number + 1}"
        run_config = write_run(folder, {name: captions[name] for name in training}, known, chosen, config)
        model = trained(run_config)
        pictures = [known[name] for name in tested]
        exchanged = pictures[1:] + pictures[:1]
        agreed, first = reversed(copied(features, captions, tested, training))
        for row, texts in zip(
            rows,
            (
                say_captions(model, pictures, beams, config.device),
                say_captions(model, pictures, greedy, config.device),
                say_captions(model, exchanged, greedy, config.device),
                agreed,
                first,
            ),
            strict=True,
        ):
            said[row] |= dict(zip(tested, texts, strict=True))
    report(out, said, captions, names, options, config, time.perf_counter() - began)


def report(
    out: Path,
    said: dict[str, dict[str, str]],
    captions: Captions,
    names: list[str],
    options: argparse.Namespace,
    config: ExperimentConfig,
    seconds: float,
) -> None:
    """Scores what was said of each picture, prints the table and writes captions.json and scores.json."""
    references = [captions[name] for name in names]
    said["best constant"] = dict.fromkeys(names, best_constant_caption(references))
    evaluator = MultimodalEvaluator(meteor=False)
    scores = {}
    for row, texts in said.items():
        measured = evaluator.evaluate_captioning([texts[name] for name in names], references)
        scores[row] = {"captions": {"count": len(names)} | measured}
    about = {"options": vars(options), "config": config.to_dict(), "seconds": round(seconds, 1)}
    write_results(out / "scores.json", about | {"scores": scores})
    write_results(out / "captions.json", said)
    print_rank0("\n".join(table(scores)))
    print_rank0(f"{duration(seconds)}; captions.json and scores.json in {out}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.crossval.crossval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = "(default: %(default)s)"
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the configuration")
    parser.add_argument("--config", default="configs/crossval.py", metavar="FILE", help=shown)
    parser.add_argument("--features", required=True, metavar="FILE", help="embeddings by picture: .safetensors or .npz")
    parser.add_argument("--captions", required=True, metavar="FILE", help="captions, in any supported format")
    parser.add_argument("--out", default="outputs/crossval", metavar="DIR", help=shown)
    parser.add_argument("--folds", type=at_least_one, default=5, metavar="N", help=shown)
    parser.add_argument("--num-beams", type=at_least_one, default=5, metavar="N", help=shown)
    parser.add_argument("--max-new-tokens", type=at_least_one, default=30, metavar="N", help=shown)
    parser.add_argument("--qwen", metavar="DIR", help="a language model, in place of the one made from captions")
    parser.add_argument("--width", type=int, default=192, metavar="N", help=f"of the language model {shown}")
    parser.add_argument("--layers", type=at_least_one, default=3, metavar="N", help=shown)
    parser.add_argument("--vocab-size", type=at_least_one, default=2000, metavar="N", help=shown)
    parser.add_argument("--standin-numbers", type=at_least_one, default=128, metavar="N", help=shown)
    parser.add_argument("--text-epochs", type=at_least_one, default=4, metavar="N", help=shown)
    parser.add_argument("--text-rate", type=float, default=3e-3, metavar="RATE", help=shown)
    return parser.parse_intermixed_args(arguments)  # settings may stand anywhere


if __name__ == "__main__":
    run(main)
