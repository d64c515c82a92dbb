"""Check official files: their checksums, then figures that others have published about them.

mmllm verify --clip openai/clip-vit-base-patch32@refs/pr/15 --qwen Qwen/Qwen2.5-0.5B --images images

`--images` is a folder with COCO's 000000039769.jpg (val2017) and CLIP.png (of github.com/openai/CLIP). `--embeddings` is
an .npz of `names` and `embeddings`: image embeddings that others computed, of images in the same folder. What is not given
is left out. The exit code is 1 if any figure differs.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmllm.commands import make_parser
from mmllm.errors import UserError
from mmllm.runtime.files import sha256_of

PUBLISHED = {  # sha256, or its first 16 digits where no more is published
    "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f": "openai/clip-vit-base-patch32",
    "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d": "openai/clip-vit-base-patch32@refs/pr/15",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "OpenAI's ViT-B-32.pt",
    "ac4f8c4b88af6d963118cbf40ad93176d092abbedfcb752601ae1866352656e6": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "fdf756fa7fcbe7404d5c60e26bff1a0c8b8aa1f72ced49e7dd0210fe288fb7fe": "Qwen/Qwen2.5-0.5B-Instruct",
    "88c142557820ccad55bb59756bfcfcf891de9cc6202816bd346445188a0ed342": "Qwen/Qwen2.5-0.5B",
    "c0382117ea329cdf": "tokenizer.json of Qwen2.5",
}
FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "tokenizer.json")
START, END = 49406, 49407  # of CLIP's texts, whose tokens follow
TEXTS = {
    "a photo of a cat": [START, 320, 1125, 539, 320, 2368, END],
    "a photo of a dog": [START, 320, 1125, 539, 320, 1929, END],
    "a diagram": [START, 320, 22697, END],
    "a dog": [START, 320, 1929, END],
    "a cat": [START, 320, 2368, END],
}
# transformers, tests/models/clip/test_modeling_clip.py, and the README of github.com/openai/CLIP
LOGITS = "000000039769", ("a photo of a cat", "a photo of a dog"), (24.5701, 19.3049), 1e-3
PROBABILITIES = "CLIP", ("a diagram", "a dog", "a cat"), (0.9927937, 0.00421068, 0.00299572), 2e-3
# transformers, tests/models/qwen2/test_modeling_qwen2.py: Qwen2.5-0.5B in bfloat16 on a CPU
PROMPT, SENTENCE = "My favourite condiment is ", "100% sugar. I have a jar of 1000 grams of sugar. I use"
MOST_TOKENS = 40
COSINE = 0.95  # of an embedding that others computed, on average; of two different images it is about 0.5


@dataclass(frozen=True)
class Check:
    name: str
    expected: str
    got: str
    is_right: bool


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("verify", __doc__)
    parser.add_argument("--clip", metavar="SOURCE", help="CLIP ViT-B/32: a folder, a hub name or OpenAI's file")
    parser.add_argument("--qwen", metavar="SOURCE", help="Qwen2.5-0.5B: a folder or a hub name")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the two images, and those of --embeddings")
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help="image embeddings that others computed")
    options = parser.parse_args(arguments)
    if not options.clip and not options.qwen:
        parser.error("name at least one of --clip and --qwen")
    total = wrong = 0
    for check in all_checks(options):
        total, wrong = total + 1, wrong + (not check.is_right)
        verdict = "right" if check.is_right else "WRONG"
        print(f"{verdict}  {check.name}\n       expected  {check.expected}\n       got       {check.got}", flush=True)
    print(f"{total} checks, {wrong} wrong")
    return 1 if wrong else 0


def all_checks(options: argparse.Namespace) -> Iterator[Check]:
    from mmllm.storage.hub import locate

    if options.clip:
        path = Path(options.clip).expanduser()
        yield from checksums(path if path.is_file() else locate(options.clip))
    if options.clip and options.images:
        yield from clip_figures(options.clip, options.images, options.embeddings)
    if options.qwen:
        folder = locate(options.qwen)
        found = list(checksums(folder))
        yield from found
        if not any("Instruct" in check.got for check in found):  # nothing is published about that one
            yield greedy_sentence(folder)


def checksums(path: Path) -> Iterator[Check]:
    """One check for each file that has a published checksum."""
    for file in [path] if path.is_file() else [path / name for name in FILES if (path / name).exists()]:
        found = sha256_of(file)
        name = PUBLISHED.get(found) or PUBLISHED.get(found[:16])
        yield Check(f"sha256 of {file}", "that of a published file", f"{name or 'unknown'}: {found}", name is not None)


def clip_figures(source: str, images: Path, embeddings: Path | None) -> Iterator[Check]:
    """Logits, probabilities and embeddings of the vision tower; the first two need transformers' text tower beside it."""
    import torch
    import torch.nn.functional as F

    from mmllm.models.clip import CLIPVisionTower
    from mmllm.models.published import read_vision
    from mmllm.storage.weights import load_strict_

    vision = read_vision(source)
    with torch.device("meta"):
        tower = CLIPVisionTower(vision.config, with_projection=True)
    load_strict_(tower, {name: value.float() for name, value in vision.tensors.items()}, source)

    @torch.no_grad()
    def embedding(file: Path) -> torch.Tensor:
        return F.normalize(tower.pooled(vision.images(file)[None])[0, 0], dim=0)

    has_text = not Path(source).expanduser().is_file()
    for name, texts, expected, tolerance in (LOGITS, PROBABILITIES) if has_text else ():
        logits = text_logits(source, embedding(find_image(images, name)), [TEXTS[text] for text in texts])
        got = (logits if name == LOGITS[0] else logits.softmax(0)).tolist()
        is_right = all(abs(a - b) <= tolerance for a, b in zip(got, expected, strict=True))
        of = "logits" if name == LOGITS[0] else "probabilities"
        yield Check(f"{of} of {name} for {texts}, within {tolerance}", numbers(expected), numbers(got), is_right)
    if embeddings:
        import numpy

        with numpy.load(embeddings) as table:
            pairs = [(images / name, row) for name, row in zip(table["names"], table["embeddings"], strict=True)]
        cosines = [float(embedding(file) @ torch.tensor(row).float()) for file, row in pairs if file.exists()]
        mean = sum(cosines) / max(1, len(cosines))
        got = f"{mean:.4f}, lowest {min(cosines, default=0):.4f}"
        yield Check(f"cosine to {len(cosines)} embeddings, mean", f"at least {COSINE}", got, mean >= COSINE)


def text_logits(source: str, image_P, texts: list[list[int]]):
    """CLIP's logits of one image for each of `texts`."""
    import torch
    import torch.nn.functional as F

    from mmllm.models.clip_text import text_embeddings
    from mmllm.runtime.files import read_json
    from mmllm.storage.hub import locate
    from mmllm.storage.weights import read_tensors

    folder = locate(source)
    found, tensors = read_json(folder / "config.json").get("text_config") or {}, read_tensors(folder)
    heads, activation = found.get("num_attention_heads", 8), found.get("hidden_act", "quick_gelu")
    longest = max(map(len, texts))
    ids_CT = torch.tensor([ids + [END] * (longest - len(ids)) for ids in texts])
    texts_CP = F.normalize(text_embeddings(tensors, ids_CT, heads, activation), dim=1)
    return tensors["logit_scale"].float().exp() * (texts_CP @ image_P)


def find_image(folder: Path, name: str) -> Path:
    for suffix in (".jpg", ".png"):
        if (folder / f"{name}{suffix}").exists():
            return folder / f"{name}{suffix}"
    raise UserError(f"{folder}: holds no {name}.jpg or .png; see mmllm verify --help for where it comes from")


def greedy_sentence(folder: Path) -> Check:
    """What the language model says after PROMPT, token by token without a cache, in the file's precision."""
    import torch

    from mmllm.data.tokenizer import Tokenizer
    from mmllm.models.multimodal import LANGUAGE_MODELS
    from mmllm.models.published import language_tensors, text_config
    from mmllm.storage.weights import load_strict_

    config, tokenizer = text_config(folder), Tokenizer(folder)
    with torch.device("meta"):
        model = LANGUAGE_MODELS[config.model_type](config)
    load_strict_(model, language_tensors(folder, config), folder)
    model.tie_weights()
    prompt = tokenizer.encode(PROMPT)
    ids, text = list(prompt), ""
    with torch.no_grad():
        while len(text) < len(SENTENCE) and len(ids) - len(prompt) < MOST_TOKENS:
            x_1TD = model(model.embed(torch.tensor([ids])))
            ids.append(int(model.logits(x_1TD[:, -1]).argmax()))
            text = tokenizer.decode(ids[len(prompt) :])
    name = f"greedy text after {PROMPT!r} (Qwen2.5-0.5B, not Instruct)"
    return Check(name, repr(SENTENCE), repr(text[: len(SENTENCE)]), text.startswith(SENTENCE))


def numbers(values) -> str:
    return " ".join(f"{value:.6g}" for value in values)
