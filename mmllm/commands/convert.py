"""Join a CLIP and a Qwen2.5 model into one mmllm directory with a new projector; or give a model another form.

    mmllm convert --clip openai/clip-vit-base-patch32 --qwen Qwen/Qwen2.5-0.5B-Instruct --out models/start
    mmllm convert --clip ./clip-folder --qwen ./qwen-folder --out models/start --features pooled
    mmllm convert --model outputs/demo/best_model --int8 --out models/demo-int8   # to answer with half the memory
    mmllm convert --model outputs/demo/best_model --int4 --out models/demo-int4   # with a third of it, a little coarser
    mmllm convert --model outputs/demo/best_model --int4 --calibrate train.json --out models/demo-int4   # less coarse
    mmllm convert --model outputs/own/best_model --merge --out models/own         # adapters added to the weights
    mmllm convert --model outputs/own/best_model --language-model --out models/own-qwen   # the tuned Qwen2.5 alone
    mmllm convert --model outputs/own/best_model --gguf Q8_0 --out models/own-gguf        # for llama.cpp and ollama

A source is a folder in the format of transformers or open_clip, OpenAI's ViT-B-32.pt, or a name on the Hugging Face hub
(NAME or NAME@REVISION), downloaded once and cached. SigLIP can take the place of CLIP, and Qwen3 that of Qwen2.5.
"""

import argparse
import sys
from pathlib import Path

from mmllm.commands import make_parser
from mmllm.errors import UserError

PACKED = ("int8", "int4")
FORMS = (*PACKED, "merge", "language_model", "gguf")
CALIBRATION_SAMPLES = 100
GGUF_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("convert", __doc__)
    for tower, default in (("--clip", "openai/clip-vit-base-patch32"), ("--qwen", "Qwen/Qwen2.5-0.5B-Instruct")):
        parser.add_argument(tower, default=default, metavar="SOURCE", help="(default: %(default)s)")
    parser.add_argument("--model", metavar="DIR", help="a model directory, instead of --clip and --qwen")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--features", choices=["patch", "pooled"], default="patch", help="(default: %(default)s)")
    parser.add_argument("--system", metavar="TEXT", help="the system text that is saved with the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(default: every tensor as its file has it)")
    forms = parser.add_mutually_exclusive_group()
    for precision in PACKED:
        forms.add_argument(f"--{precision}", action="store_true", help=f"{precision} weights: to answer, not to train")
    forms.add_argument("--merge", action="store_true", help="with --model: add the adapters to the weights")
    forms.add_argument(
        "--language-model", action="store_true", help="with --model: its Qwen2.5 alone, for transformers"
    )
    forms.add_argument("--gguf", choices=GGUF_KINDS, help="with --model: files for llama.cpp and ollama")
    parser.add_argument(
        "--calibrate", metavar="FILE", help="with --int4: samples, a hundred of which it is rounded for"
    )
    parser.add_argument("--image-dir", metavar="DIR", help="where their images are (default: beside FILE)")
    parser.add_argument("--seed", type=int, default=0, help="of the new projector (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="refuse weights that are not finite (reads all of them)")
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")
    options = parser.parse_args(arguments)
    form = next((name for name in FORMS if getattr(options, name)), None)
    if options.model and not form:
        parser.error("--model is a model already; say what to make of it: --int8, --int4, --merge, ...")
    if form not in (None, *PACKED) and not options.model:
        parser.error(f"--{form.replace('_', '-')} needs --model DIR")
    if form in (*PACKED, "gguf") and options.dtype:
        parser.error(f"--{form} and --dtype exclude each other")
    if options.calibrate and not (options.int4 and options.model):
        parser.error("--calibrate needs --int4 and --model DIR")
    options.packed = form if form in PACKED else None
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
    from mmllm.layers.quantized import count_weights
    from mmllm.storage.weights import refuse_not_finite

    model = load(options)
    if options.check or options.calibrate:
        refuse_not_finite(model.state_dict(), "the model")
    then = write(model, options)
    size = sum(file.stat().st_size for file in out.iterdir())
    image = f"{model.config.num_image_tokens} tokens an image"
    print(f"{options.out}: {count_weights(model):,} parameters, {size / 1e6:,.1f} MB, {image}")
    print(f"next: {then}", file=sys.stderr)


def load(options: argparse.Namespace):
    """The model, in the dtype of its files unless --dtype says another."""
    import torch

    from mmllm.data.chat import DEFAULT_SYSTEM
    from mmllm.models.multimodal import MultimodalLLM

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.model:
        model = MultimodalLLM.from_pretrained(options.model, dtype=torch.float32 if options.calibrate else None)
        if packed := model.form.packed:
            raise UserError(f"{options.model}: its weights are {packed}, to answer with; name the model they came from")
        return model
    return MultimodalLLM.from_towers(
        options.clip,
        options.qwen,
        features=options.features,
        system=DEFAULT_SYSTEM if options.system is None else options.system,
        seed=options.seed,
        dtype=dtype,
    )


def write(model, options: argparse.Namespace) -> str:
    """Writes the form that is asked for; returns the command to go on with."""
    import torch

    from mmllm.data.samples import load_samples
    from mmllm.inference.optimize import make_packed_
    from mmllm.models.export import merge_adapters_, save_language_model
    from mmllm.models.gguf import write_gguf
    from mmllm.storage.atomic import atomic_directory

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if model.form.lora and not options.packed:
        print(merge_adapters_(model, dtype), file=sys.stderr)
    elif options.merge:
        raise UserError(f"{options.model}: has no adapters to merge")
    if options.gguf:
        with atomic_directory(options.out, replace=options.force) as temporary:
            write_gguf(model, temporary, options.gguf)
        files = f"-m {options.out}/model.gguf --mmproj {options.out}/mmproj.gguf"
        return f"llama-mtmd-cli {files} --temp 0 --image x.jpg -p 'Describe this image.'"
    if options.language_model:
        save_language_model(model, options.out, replace=options.force)
        return f'AutoModelForCausalLM.from_pretrained("{options.out}") of transformers'
    if options.packed:
        samples = load_samples(options.calibrate, options.image_dir) if options.calibrate else []
        make_packed_(model, options.packed, samples[:: -(-len(samples) // CALIBRATION_SAMPLES) or 1])
    model.save_pretrained(options.out, replace=options.force)
    then = f"sample --model {options.out} --image x.jpg"
    if not options.model and not options.packed:
        then = f"train full model.pretrained={options.out} data.train_data_path=..."
    return f"python -m mmllm {then}"
