"""Published towers in the layouts in which people have them, as the sizes and tensors of ours.

    transformers     CLIP and SigLIP, whole or the vision tower alone, with or without the prefix `vision_model.`; Qwen2.5
                     and Qwen3; LLaVA, in the three spellings of its names
    OpenAI's CLIP    ViT-B-32.pt, a TorchScript archive, or a file of its tensors
    open_clip        open_clip_config.json beside open_clip_model.safetensors or open_clip_pytorch_model.bin

Names: https://github.com/openai/CLIP (clip/model.py), https://github.com/mlfoundations/open_clip
(src/open_clip/transformer.py).
"""

import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.data.image import ImageProcessor
from mmllm.data.processor_files import load_image_processor
from mmllm.errors import CheckpointError
from mmllm.models.config import TEXT, VISION, CLIPVisionConfig, Qwen2Config, VisionConfig, tower_config
from mmllm.runtime.files import read_json, refuse_other
from mmllm.storage.hub import locate
from mmllm.storage.weights import read_bin, read_safetensors, read_tensors, refuse_pointer, unwrapped

POSITIONS = "vision_model.embeddings.position_embedding.weight"
FILE_TYPES = (".pt", ".pth", ".bin", ".safetensors")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HEAD_WIDTH = 64  # of OpenAI's and open_clip's towers, whose tensors do not tell it
OPENAI_NAMES = {  # after `visual.`; regular expressions, and transformers' names
    r"class_embedding$": "vision_model.embeddings.class_embedding",
    r"positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"conv1\.weight$": "vision_model.embeddings.patch_embedding.weight",
    r"ln_pre\.(\w+)$": r"vision_model.pre_layrnorm.\1",
    r"ln_post\.(\w+)$": r"vision_model.post_layernorm.\1",
    r"proj$": "visual_projection.weight",
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)$": r"vision_model.encoder.layers.\1.layer_norm\2.\3",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)$": r"vision_model.encoder.layers.\1.self_attn.out_proj.\2",
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)$": r"vision_model.encoder.layers.\1.self_attn.{}_proj.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)$": r"vision_model.encoder.layers.\1.mlp.fc1.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)$": r"vision_model.encoder.layers.\1.mlp.fc2.\2",
}
LLAVA_NAMES = {  # as transformers holds them in memory, and as it writes them
    r"(?:model\.)?vision_tower\.(?!visual_projection)(?:vision_model\.)?": "vision_tower.vision_model.",
    r"model\.multi_modal_projector\.": "multi_modal_projector.",
    r"model\.language_model\.": "language_model.model.",
    r"lm_head\.": "language_model.lm_head.",
}


@dataclass(frozen=True)
class VisionSource:
    """A published vision tower: its sizes, its tensors under our names, and the processor of its images."""

    config: VisionConfig
    tensors: dict[str, Tensor]
    images: ImageProcessor


def read_vision(source: str | Path) -> VisionSource:
    """The vision tower of a folder, a hub name, or one file of OpenAI's CLIP."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in FILE_TYPES:
        config, tensors = openai_tower(read_file(path), "quick_gelu", path)
        return VisionSource(config, tensors, ImageProcessor(config.image_size))
    folder = locate(source)
    for name in OPEN_CLIP_FILES:
        if (folder / name).exists() and not is_of_transformers(folder):
            return read_open_clip(folder, name)
    return VisionSource(read_config(folder, VISION), vision_tensors(folder), load_image_processor(folder))


def resized(source: VisionSource, image_size: int) -> VisionSource:
    """The tower for square images of another size, whose positions lie between those that it has learned.

    Bicubic, as ViT's authors and transformers do: https://arxiv.org/abs/2010.11929, section 3.2. N patches, D hidden size.
    """
    config, images = replace(source.config, image_size=image_size), replace(source.images, size=image_size)
    learned_ND = source.tensors[POSITIONS]
    num_class = len(learned_ND) - source.config.num_patches  # the class token's position stays
    old, new = (c.image_size // c.patch_size for c in (source.config, config))
    grid_1DHW = learned_ND[num_class:].float().T.unflatten(1, (old, old))[None]
    grid_1DHW = F.interpolate(grid_1DHW, (new, new), mode="bicubic", align_corners=False)
    positions_ND = torch.cat([learned_ND[:num_class], grid_1DHW[0].flatten(1).T.to(learned_ND.dtype)])
    return VisionSource(config, source.tensors | {POSITIONS: positions_ND}, images)


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder that open_clip wrote holds transformers' files as well, as LAION's do; timm's are no such."""
    file = folder / "config.json"
    return file.exists() and "model_type" in read_json(file) and any(folder.glob("model*.safetensors"))


def vision_config(source: str | Path) -> VisionConfig:
    """The sizes of what `read_vision` would read; of a hub repository only small files are downloaded."""
    is_file = Path(source).expanduser().is_file()
    folder = None if is_file else locate(source, weights=False)
    return read_config(folder, VISION) if folder and (folder / "config.json").exists() else read_vision(source).config


def text_config(source: str | Path) -> Qwen2Config:
    return read_config(locate(source, weights=False), TEXT)


def read_config(folder: Path, kinds: dict[str, type]) -> VisionConfig | Qwen2Config:
    file = folder / "config.json"
    return tower_config(read_json(file), kinds, file)


def vision_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of transformers' vision tower, the projection too; a CLIP file also holds the text tower and, in old
    files, position ids."""
    tensors = read_tensors(folder)
    if "embeddings.patch_embedding.weight" in tensors:  # `CLIPVisionModel` as transformers 5 writes it
        tensors = {f"vision_model.{name}": value for name, value in tensors.items()}
    kept = ("vision_model.", "visual_projection.")
    return {name: v for name, v in tensors.items() if name.startswith(kept) and not name.endswith(".position_ids")}


def language_tensors(folder: Path, config: Qwen2Config) -> dict[str, Tensor]:
    """The tensors of a Qwen file; where the head is tied, one in the file must equal the embedding."""
    tensors = read_tensors(folder)
    embedding = tensors.get("model.embed_tokens.weight", torch.empty(0))
    if config.tie_word_embeddings and not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
        raise CheckpointError(f"{folder}: lm_head.weight differs from the embedding, but config.json says it is tied")
    return tensors


def llava_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model directory, or of a LLaVA folder with its names in any spelling."""
    return {renamed(LLAVA_NAMES, name): v for name, v in read_tensors(folder).items() if "position_ids" not in name}


def renamed(names: dict[str, str], name: str) -> str:
    """`name`, its begin replaced by the first of `names` that matches."""
    for pattern, new in names.items():
        changed, count = re.subn(f"^{pattern}", new, name)
        if count:
            return changed
    return name


# OpenAI and open_clip


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; of a TorchScript archive as OpenAI published it, too."""
    if file.suffix == ".safetensors":
        return unwrapped(read_safetensors(file))
    refuse_pointer(file)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            is_script = any("/code/" in name for name in archive.namelist())
        if is_script:
            try:
                return dict(torch.jit.load(file, map_location="cpu").state_dict())
            except RuntimeError as error:
                raise CheckpointError(f"{file}: a broken TorchScript archive; download it again") from error
    return unwrapped(read_bin(file))


def read_open_clip(folder: Path, name: str) -> VisionSource:
    file = folder / "open_clip_config.json"
    content = {"model_cfg": {}, "preprocess_cfg": {}} | read_json(file)
    model, pixels = content["model_cfg"], content["preprocess_cfg"]
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(vision, dict) or not isinstance(pixels, dict):
        raise CheckpointError(f"{file}: model_cfg.vision_cfg and preprocess_cfg must be groups of settings")
    plain = {"head_width": HEAD_WIDTH, "timm_model_name": None, "norm_kwargs": None, "act_kwargs": None}
    plain |= {"pool_type": "tok", "attentional_pool": False, "no_ln_pre": False, "final_ln_after_pool": False}
    refuse_other(vision, plain, f"{file}: vision_cfg")
    refuse_other(
        pixels, {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}, f"{file}: preprocess_cfg"
    )
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    config, tensors = openai_tower(read_file(folder / name), activation, folder / name)
    statistics = {f"image_{key}": pixels.get(key) for key in ("mean", "std")}
    sizes = {"size": config.image_size, "crop_size": config.image_size}
    return VisionSource(config, tensors, ImageProcessor.from_dict(sizes | statistics, file))


def openai_tower(
    tensors: dict[str, Tensor], activation: str, where: Path
) -> tuple[CLIPVisionConfig, dict[str, Tensor]]:
    """Sizes and tensors of the vision transformer in a state dict with OpenAI's names."""
    found = {name.removeprefix("visual."): v for name, v in tensors.items() if name.startswith("visual.")}
    if not {"conv1.weight", "positional_embedding", "proj", "transformer.resblocks.0.mlp.c_fc.weight"} <= found.keys():
        raise CheckpointError(f"{where}: holds no vision transformer under the names of OpenAI's CLIP")
    width, _, _, patch = found["conv1.weight"].shape
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(found["transformer.resblocks.0.mlp.c_fc.weight"]),
        num_hidden_layers=sum(name.endswith(".ln_1.weight") for name in found),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=patch * int((len(found["positional_embedding"]) - 1) ** 0.5),
        patch_size=patch,
        projection_dim=found["proj"].shape[1],
        hidden_act=activation,
    )
    ours = {}
    for name, value in found.items():
        new = renamed(OPENAI_NAMES, name)
        if "{}" in new:
            ours |= {new.format(part): piece for part, piece in zip("qkv", value.chunk(3), strict=True)}
        else:
            ours[new] = value.T if name == "proj" else value
    return config, ours
