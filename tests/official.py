"""Tiny random models in the official file format, written with weights that show mistakes.

Default initialisation (std 0.02, zero biases, unit norms) hides most errors of a port: a missing bias or norm weight
changes nothing. Here every tensor is drawn with a wide distribution, seeded by its name: matrices with std 1/sqrt(fan in),
biases 0.3, some key biases twelve times that, norm weights around 1, the final norm around 4.

    write_clip(folder, **vision_config)    a CLIP folder: config.json, preprocessor_config.json, model.safetensors
    write_siglip(folder, **vision_config)  a SigLIP folder, of the same files
    write_qwen(folder, **config)           a Qwen2.5 folder: config.json, generation_config.json, tokenizer.json, weights
    write_qwen3(folder, **config)          a Qwen3 folder
    write_tokenizer(folder)                tokenizer.json with all of Qwen2.5's control tokens
    write_model(folder, features="patch")  both, joined: an mmllm model directory; also of `vision=write_siglip, text=write_qwen3`
"""

import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from examples.pretrain.folders import CONTROL_TOKENS, SPLIT
from mmllm.config.schema import LoraConfig
from mmllm.layers.lora import adapters, add_lora_
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, Qwen2Config, Qwen3Config, SigLIPVisionConfig
from mmllm.models.loading import ModelForm
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen import Qwen2
from mmllm.models.qwen3 import Qwen3
from mmllm.models.siglip import SigLIPVisionTower

CLIP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 48,
}
QWEN = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def randomise_(module: nn.Module) -> None:
    """Draws every parameter so widely that a mistake in any of them shows."""
    for name, parameter in module.named_parameters():
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=rng)
        if name.endswith("embed_tokens.weight"):
            value = 0.1 * noise  # logits of a tied head then have a standard deviation of about 3
        elif parameter.ndim >= 2:
            value = noise if "embedding" in name else noise / math.sqrt(parameter[0].numel())
        elif name.endswith("bias"):
            value = 0.3 * noise
            if "k_proj" in name:
                value[::7] *= 12
        elif name.endswith("model.norm.weight"):
            value = 4 + noise
        elif "norm" in name:
            value = 1 + 0.25 * noise
        else:
            value = noise
        parameter.data.copy_(value)


def published_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that an official file holds: a tied head is not one of them."""
    tied = {"lm_head.weight"} if isinstance(module, Qwen2) and module.config.tie_word_embeddings else set()
    return {name: value.contiguous() for name, value in module.state_dict().items() if name not in tied}


def write_clip(folder: str | Path, **overrides) -> Path:
    config = CLIPVisionConfig.from_dict(CLIP | overrides)
    content = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.projection_dim}
    images = {"size": config.image_size, "crop_size": config.image_size, "resample": 3, "do_center_crop": True}
    return write_vision(Path(folder), CLIPVisionTower(config, with_projection=True), content, images)


def write_siglip(folder: str | Path, **overrides) -> Path:
    config = SigLIPVisionConfig.from_dict(CLIP | overrides)
    half = [0.5, 0.5, 0.5]
    images = {"size": {"height": config.image_size, "width": config.image_size}, "image_mean": half, "image_std": half}
    content = {"architectures": ["SiglipModel"], "model_type": "siglip"}
    return write_vision(Path(folder), SigLIPVisionTower(config, with_projection=True), content, images)


def write_vision(folder: Path, tower: nn.Module, content: dict, images: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    randomise_(tower)
    save_file(published_tensors(tower), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content | {"vision_config": tower.config.to_dict()}))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def write_qwen3(folder: str | Path, **overrides) -> Path:
    return write_qwen(folder, kind=Qwen3, **{"head_dim": 32} | overrides)


def write_qwen(folder: str | Path, shards: int = 1, kind: type[Qwen2] = Qwen2, **overrides) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = (Qwen3Config if kind is Qwen3 else Qwen2Config).from_dict(QWEN | overrides)
    model = kind(config)
    randomise_(model)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = published_tensors(model)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: str | Path) -> Path:
    """All bytes, a few merges, Qwen2.5's splitting rule and its control tokens: 280 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "a"),
        ("i", "n"),
        ("Ġ", "the"),
        ("o", "n"),
        ("e", "r"),
        ("Ġ", "c"),
        ("a", "t"),
    ]
    merges += [("in", "g")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_model(
    folder: str | Path, features: str = "patch", clip: dict | None = None, vision=write_clip, text=write_qwen, **qwen
) -> Path:
    """An mmllm model directory of random towers; further arguments change the language model's configuration."""
    folder = Path(folder)
    sources = folder.parent / f"{folder.name}-sources"
    clip_folder, qwen_folder = vision(sources / "clip", **(clip or {})), text(sources / "qwen", **qwen)
    model = MultimodalLLM.from_towers(clip_folder, qwen_folder, features=features)
    randomise_(model.multi_modal_projector)
    model.save_pretrained(folder)
    return folder


def add_adapters(model_folder: str | Path, folder: str | Path) -> Path:
    """The model of `model_folder` with LoRA adapters that change its answers, in `folder`."""
    model = MultimodalLLM.from_pretrained(model_folder)
    add_lora_(model.language_model, LoraConfig(r=3))
    rng = torch.Generator().manual_seed(5)
    for layer in adapters(model.language_model).values():
        layer.lora_B.data = 0.2 * torch.randn(layer.lora_B.shape, generator=rng)
    model.form = ModelForm(lora=LoraConfig(r=3))
    model.save_pretrained(folder)
    return Path(folder)
