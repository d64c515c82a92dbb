"""Join a CLIP and a Qwen2.5 model into one mmllm directory with a new projector between them; or make a model int8.

    mmllm convert --clip openai/clip-vit-base-patch32 --qwen Qwen/Qwen2.5-0.5B-Instruct --out models/start
    mmllm convert --clip ./clip-folder --qwen ./qwen-folder --out models/start --features pooled
    mmllm convert --model outputs/demo/best_model --int8 --out models/demo-int8   # to answer with half the memory

A source is a folder in the format of transformers or open_clip, OpenAI's ViT-B-32.pt, or a name on the Hugging Face hub
(NAME or NAME@REVISION), downloaded once and cached. SigLIP can take the place of CLIP, and Qwen3 that of Qwen2.5.
"""

import argparse
import sys
from pathlib import Path

from mmllm.commands import make_parser
from mmllm.errors import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("convert", __doc__)
    for tower, default in (("--clip", "openai/clip-vit-base-patch32"), ("--qwen", "Qwen/Qwen2.5-0.5B-Instruct")):
        parser.add_argument(tower, default=default, metavar="SOURCE", help="(default: %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="a model directory, instead of --clip and --qwen")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--features", choices=["patch", "pooled"], default="patch", help="(default: %(default)s)")
    parser.add_argument("--system", metavar="TEXT", help="the system text that is saved with the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(default: every tensor as its file has it)")
    parser.add_argument("--int8", action="store_true", help="int8 weights: to answer, not to train")
    parser.add_argument("--seed", type=int, default=0, help="of the new projector (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="refuse weights that are not finite (reads all of them)")
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")
    options = parser.parse_args(arguments)
    if options.model and not options.int8:
        parser.error("--model is a model already; say what to make of it: --int8")
    if options.int8 and options.dtype:
        parser.error("--int8 and --dtype exclude each other")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    out = Path(options.out).resolve()
    for name in ("model",) if options.model else ("clip", "qwen"):
        source = Path(getattr(options, name))
        if source.exists() and (source.resolve() == out or out in source.resolve().parents):
            raise UserError(f"--out {options.out} is or holds --{name} {source}; choose another directory")
    if out.exists() and not options.force:
        raise UserError(f"--out {options.out} exists already; choose another name, or replace it with --force")
    import torch

    from mmllm.data.chat import DEFAULT_SYSTEM
    from mmllm.inference.optimize import make_int8_
    from mmllm.layers.quantized import count_weights
    from mmllm.models.multimodal import MultimodalLLM
    from mmllm.storage.weights import refuse_not_finite

    if options.model:
        model = MultimodalLLM.from_pretrained(options.model, dtype=None)
    else:
        model = MultimodalLLM.from_towers(
            options.clip,
            options.qwen,
            features=options.features,
            system=DEFAULT_SYSTEM if options.system is None else options.system,
            seed=options.seed,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
        )
    if options.check:
        refuse_not_finite(model.state_dict(), "the joined model")
    parameters = count_weights(model)
    if options.int8:
        make_int8_(model)
    model.save_pretrained(out, replace=options.force)
    size = sum(file.stat().st_size for file in out.iterdir())
    image = f"{model.config.num_image_tokens} tokens an image"
    print(f"{options.out}: {parameters:,} parameters, {size / 1e6:,.1f} MB, {image}")
    then = f"sample --model {options.out} --dtype int8 --image x.jpg"
    if not options.int8:
        then = f"train full model.pretrained={options.out} data.train_data_path=..."
    print(f"next: python -m mmllm {then}", file=sys.stderr)
