"""Models of the true shapes with random weights, for benchmarks without the published ones.

Speed and memory do not depend on what was trained, so they can be measured without a download. A tensor is drawn by its
own name, so two programs that build the same architecture hold the same numbers, and their losses can be compared.
"""

import math
import re
import zlib
from itertools import islice, product
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from examples.pretrain.folders import CONTROL_TOKENS, add_control_tokens_, byte_level
from mmllm.data.image import ImageProcessor
from mmllm.models.config import CLIPVisionConfig, MultimodalConfig, Qwen2Config
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.files import write_json
from mmllm.storage.atomic import atomic_directory
from mmllm.storage.weights import write_safetensors

QWEN_WORDS = 151643  # tokens of Qwen2.5 before its control tokens
TINY_VISION = CLIPVisionConfig(64, 128, 3, 2, image_size=32, patch_size=8)
TINY_TEXT = Qwen2Config(512, 64, 160, 4, 4, 2, head_dim=16, max_position_embeddings=2048)
TEXT_TOKENS = 32  # of a prompt, beside the image
SIZES = ("full", "tiny")


def sizes(name: str = "full", layers: int | None = None) -> MultimodalConfig:
    """The architecture: "full" is CLIP ViT-B/32 with Qwen2.5-0.5B; `layers` cuts both towers to so many."""
    vision, text = (CLIPVisionConfig(), Qwen2Config()) if name == "full" else (TINY_VISION, TINY_TEXT)
    if layers:
        vision = CLIPVisionConfig(**vars(vision) | {"num_hidden_layers": min(layers + 1, vision.num_hidden_layers)})
        text = Qwen2Config(**vars(text) | {"num_hidden_layers": min(layers, text.num_hidden_layers)})
    words = QWEN_WORDS if name == "full" else text.vocab_size - len(CONTROL_TOKENS)
    return MultimodalConfig(vision, text, "patch", words + CONTROL_TOKENS.index("<|image_pad|>"))


def random_model(config: MultimodalConfig, device: str | torch.device = "cpu") -> MultimodalLLM:
    """The model in float32, its tensors drawn by name. It has no processor."""
    with torch.device("meta"):
        model = MultimodalLLM(config)
    model.to_empty(device=device)
    model.language_model.tie_weights()
    fill_(model)
    return model


@torch.no_grad()
def fill_(model: nn.Module) -> None:
    """Draws every parameter by the published name of its tensor, whichever program it belongs to.

    Those of the language model are bfloat16 numbers, as the published ones are; CLIP's are not.
    """
    for name, parameter in model.named_parameters():
        rng = torch.Generator(parameter.device).manual_seed(zlib.crc32(published_name(name).encode()))
        if parameter.ndim >= 2:
            is_table = "embed" in name and "patch" not in name
            parameter.normal_(0, 0.1 if is_table else 1 / math.sqrt(parameter[0].numel()), generator=rng)
        elif "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.1, generator=rng)
        if "vision_tower" not in name:
            parameter.copy_(parameter.bfloat16())


def published_name(name: str) -> str:
    """The name of a tensor without the prefixes in which programs differ."""
    return re.sub(r"^model\.|(?<=language_model\.)model\.|vision_model\.", "", name)


def random_tokenizer(words: int = QWEN_WORDS) -> Tokenizer:
    """A byte-level tokenizer of `words` meaningless tokens, and Qwen2.5's control tokens after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = product(alphabet, alphabet)
    longer = ((first + second, third) for first, second in product(alphabet, alphabet) for third in alphabet)
    merges = list(islice((pair for source in (pairs, longer) for pair in source), words - len(alphabet)))
    vocab = {token: i for i, token in enumerate([*alphabet, *(first + second for first, second in merges)])}
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=merges))
    add_control_tokens_(tokenizer)
    return tokenizer


def write_towers(folder: Path, config: MultimodalConfig) -> tuple[Path, Path]:
    """The folders of a CLIP and a Qwen2.5 in their published format, bfloat16; kept when they are there already."""
    clip, qwen = folder / "clip", folder / "qwen"
    if clip.is_dir() and qwen.is_dir():
        return clip, qwen
    model = random_model(config).to(torch.bfloat16)
    vision = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": config.vision.to_dict()}
    with atomic_directory(clip, replace=True) as temporary:
        write_safetensors(temporary / "model.safetensors", model.vision_tower.state_dict())
        write_json(temporary / "config.json", vision)
        write_json(temporary / "preprocessor_config.json", ImageProcessor(config.vision.image_size).to_dict())
    tensors = {name: value for name, value in model.language_model.state_dict().items() if name != "lm_head.weight"}
    with atomic_directory(qwen, replace=True) as temporary:
        write_safetensors(temporary / "model.safetensors", tensors)
        write_json(temporary / "config.json", config.text.to_dict())
        words = config.image_token_id - CONTROL_TOKENS.index("<|image_pad|>")
        random_tokenizer(words).save(str(temporary / "tokenizer.json"))
    return clip, qwen


def write_model(folder: Path, config: MultimodalConfig) -> Path:
    """A whole model directory of random weights in bfloat16, as `convert_weights.py` writes one."""
    if not folder.is_dir():
        clip, qwen = write_towers(folder.parent / "towers", config)
        MultimodalLLM.from_towers(clip, qwen, dtype=None).save_pretrained(folder)
    return folder


def prompt_ids(spec: dict, row: int) -> list[int]:
    """The prompt of a row: words with the positions of an image among them; each row has its own."""
    config = sizes(spec["size"], spec["layers"])
    rng = torch.Generator().manual_seed(row)
    words = torch.randint(0, config.image_token_id - 12, (TEXT_TOKENS,), generator=rng).tolist()
    return [*words[:4], *[config.image_token_id] * config.num_image_tokens, *words[4:]]


def image(spec: dict, row: int) -> Tensor:
    side = sizes(spec["size"], spec["layers"]).vision.image_size
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(row))
