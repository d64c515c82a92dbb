"""The steps of the public recipe, as commands.

The projector first learns from 558,000 web captions (LLaVA's alignment), then projector and language model from COCO's
captions, VQAv2 and LLaVA's mixture together. A reward for whole captions comes last: it knows COCO alone, so the questions
are asked of the model before it as well. All data share one folder of images, so each archive is downloaded once.
"""

import argparse
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from mmllm.data.samples import UNFINISHED
from mmllm.errors import RunError
from mmllm.runtime.console import print_rank0

DATA = ("llava-pretrain", "coco", "vqav2", "llava-instruct")
MIXTURE = ("coco", "vqav2", "llava-instruct")
ALIGN = ("stage1.epochs=1", "stage2.epochs=0", "data.val_fraction=0.002")
# 1,024 tokens hold all but the longest of LLaVA's conversations
MIX = ("stage1.epochs=0", "stage2.epochs=2", "data.max_length=1024", "best_metric=cider", "num_metric_samples=500")
REWARD = (
    "stage1.epochs=0",
    "stage2.epochs=0",
    "stage3.epochs=1",
    "stage3.learning_rate=1e-6",
    "num_metric_samples=500",
)
ASKED = {"coco": ("--num-beams", "5", "--max-new-tokens", "30"), "vqav2": ("--max-new-tokens", "10")}
EVALUATIONS = (
    ("mix", "coco"),
    ("mix", "vqav2"),
    ("reward", "coco"),
    ("reward", "vqav2"),
)  # of which model on which data


def run_recipe(options: argparse.Namespace) -> None:
    """Every step that is not done yet. The models are in `options.out`/mix and /reward."""
    start, images = options.out / "start", options.data / "images"
    if not start.exists():
        command("convert", "--clip", options.clip, "--qwen", options.qwen, "--out", start)
    for name in DATA:
        if not (options.data / name / "train.jsonl").exists() or (options.data / name / UNFINISHED).exists():
            table = ("--table", options.table) if options.table else ()
            command("prepare", name, "--out", options.data / name, "--image-dir", images, *table)
    train(options, "align", start, ("llava-pretrain",), ALIGN)
    val = f"data.val_data_path={options.data / 'coco' / 'val.jsonl'}"
    train(options, "mix", options.out / "align" / "best_model", MIXTURE, (*MIX, val))
    train(options, "reward", options.out / "mix" / "best_model", ("coco",), (*REWARD, val))
    for model, name in EVALUATIONS:
        out = options.out / model / "evaluation" / name
        if not (out / "scores.json").exists():
            data = ("--data", options.data / name / "test.jsonl", "--image-dir", images, "--out", out)
            more = ("--device", options.device, "--blank", "--constant")
            best = ("--model", options.out / model / "best_model")
            command("evaluate", *best, *data, *ASKED[name], *more, processes=options.processes)


def train(
    options: argparse.Namespace, name: str, start: Path, data: tuple[str, ...], settings: tuple[str, ...]
) -> None:
    files = ",".join(str(options.data / part / "train.jsonl") for part in data)
    where = (f"experiment_name={name}", f"output_dir={options.out}", f"device={options.device}")
    read = (f"data.train_data_path={files}", f"data.image_dir={options.data / 'images'}", "data.bad_samples=skip")
    model = f"model.pretrained={start}"
    chosen = (*where, model, *read, "data.num_workers=8", *settings, *options.settings)
    command("train", "full", *chosen, "--resume", "auto", processes=options.processes)


def command(name: str, *arguments: object, processes: int = 1) -> None:
    """Runs `mmllm NAME`, in this process or by torchrun in several. RunError where it stops."""
    words = [name, *map(str, arguments)]
    start = ["-m", "mmllm"] if processes == 1 else ["-m", "torch.distributed.run", "--standalone"]
    start += [f"--nproc_per_node={processes}", "-m", "mmllm"] if processes > 1 else []
    print_rank0(f"\n$ python {shlex.join([*start, *words])}")
    if processes > 1:
        code = subprocess.run([sys.executable, *start, *words]).returncode
    else:
        code = import_module(f"mmllm.commands.{name}").main(words[1:])
    if code:
        raise RunError(f"`mmllm {name}` ended with code {code}; see above, then start the recipe again to continue")
