"""Sizes of the two towers and of the whole model, under the names of the official config.json files.

`from_dict` reads what is in such a file. Absent fields mean what transformers takes for them; a value that cannot be, or
that would change the numbers, is refused by name. `where` is the file, for the message.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mmllm.config.validation import shown
from mmllm.errors import CheckpointError
from mmllm.runtime.files import refuse_other, typed

Size = Annotated[int, Field(ge=1, le=2**24)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Group = dict[str, object]

LLAVA = {  # what the architecture fixes of LLaVA's settings
    "vision_feature_layer": -2,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}


@dataclass(frozen=True)
class VisionConfig:
    """What the configurations of both vision towers have in common."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    image_size: Size = 224
    patch_size: Size = 16

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}, "
                f"image_size {self.image_size} of patch_size {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def to_dict(self) -> dict:
        return {"model_type": self.model_type, "num_channels": 3, **asdict(self)}


@dataclass(frozen=True)
class CLIPVisionConfig(VisionConfig):
    """The vision tower; the defaults are ViT-B/32."""

    patch_size: Size = 32
    projection_dim: Size = 512
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"  # LAION's CLIPs use the exact one
    layer_norm_eps: Positive = 1e-5
    model_type: ClassVar = "clip_vision_model"
    select_strategy: ClassVar = "default"  # in LLaVA's words: without the class token

    @classmethod
    def from_dict(cls, config: dict, where: str | Path = "CLIP config") -> "CLIPVisionConfig":
        """From a CLIP config.json or its vision part."""
        vision = vision_part(config, where)
        if vision is not config and config.get("projection_dim") is not None:
            vision = vision | {"projection_dim": config["projection_dim"]}
        refuse_other(vision, {"num_channels": 3}, where)
        return typed(cls, vision, where)


@dataclass(frozen=True)
class SigLIPVisionConfig(VisionConfig):
    """SigLIP's vision tower, and SigLIP2's of a fixed size; the defaults are B/16 at 224 pixels."""

    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    layer_norm_eps: Positive = 1e-6
    model_type: ClassVar = "siglip_vision_model"
    select_strategy: ClassVar = "full"  # there is no class token

    @property
    def projection_dim(self) -> int:
        """Size of the pooled output."""
        return self.hidden_size

    @classmethod
    def from_dict(cls, config: dict, where: str | Path = "SigLIP config") -> "SigLIPVisionConfig":
        """From a SigLIP config.json or its vision part."""
        vision = vision_part(config, where)
        refuse_other(vision, {"num_channels": 3, "vision_use_head": True}, where)
        return typed(cls, vision, where)


def vision_part(config: dict, where: str | Path) -> dict:
    """The vision part of a CLIP or SigLIP config.json, or `config` where it is one itself.

    `vision_config_dict`, of old files, wins over `vision_config`, as in transformers.
    """
    for name in ("vision_config_dict", "vision_config"):
        if (part := config.get(name)) is not None:
            if not isinstance(part, dict):
                raise CheckpointError(f"{where}: {name} must be a group of settings")
            return part
    return config


@dataclass(frozen=True)
class _Qwen2Fields:
    """Those fields of a Qwen2 config.json that have no default here, or decide about others."""

    vocab_size: Size
    hidden_size: Size
    num_attention_heads: Size
    rope_parameters: Group = field(default_factory=dict)  # of transformers 5
    rope_scaling: Group = field(default_factory=dict)
    layer_types: tuple[Literal["full_attention"], ...] = ()


@dataclass(frozen=True)
class Qwen2Config:
    """The language model; the defaults are Qwen2.5-0.5B."""

    vocab_size: Size = 151936
    hidden_size: Size = 896
    intermediate_size: Size = 4864
    num_hidden_layers: Layers = 24
    num_attention_heads: Size = 14
    num_key_value_heads: Size = 2
    head_dim: Size = 64
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: Size = 32768
    model_type: ClassVar = "qwen2"
    architecture: ClassVar = "Qwen2ForCausalLM"
    default_head_dim: ClassVar = None  # hidden_size / num_attention_heads
    fixed: ClassVar = {
        "use_sliding_window": False,
        "hidden_act": "silu",
        "use_mrope": False,
        "attention_dropout": 0.0,
        "partial_rotary_factor": 1.0,
    }

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}, and head_dim {self.head_dim} even"
            )

    @classmethod
    def from_dict(cls, config: dict, where: str | Path = "Qwen config") -> "Qwen2Config":
        """From a config.json as published or as transformers 5 writes it."""
        found = typed(_Qwen2Fields, config, where)
        rope = found.rope_parameters or found.rope_scaling
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{where}: rope scaling {kind!r} is not supported; use the plain model")
        refuse_other(config | rope, cls.fixed, where)
        values = {
            "num_key_value_heads": found.num_attention_heads,
            "head_dim": cls.default_head_dim or found.hidden_size // found.num_attention_heads,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
        }
        given = config | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
        return typed(cls, values | {name: value for name, value in given.items() if value is not None}, where)

    def to_dict(self) -> dict:
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **asdict(self),
        }


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """One of Qwen3's dense language models."""

    model_type: ClassVar = "qwen3"
    architecture: ClassVar = "Qwen3ForCausalLM"
    default_head_dim: ClassVar = 128
    fixed: ClassVar = Qwen2Config.fixed | {"attention_bias": False}


VISION = {"clip": CLIPVisionConfig, "siglip": SigLIPVisionConfig}  # by model_type of config.json
VISION |= {kind.model_type: kind for kind in VISION.values()}
TEXT = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tower_config(config: dict, kinds: dict[str, type], where: str | Path) -> VisionConfig | Qwen2Config:
    """The sizes of one tower: the kind of `kinds`, VISION or TEXT, that model_type names."""
    if (found := config.get("model_type")) not in list(kinds):
        raise CheckpointError(f"{where}: model_type is {shown(found)}; it must be one of {', '.join(kinds)}")
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: a quantised model; use the plain one")
    return kinds[found].from_dict(config, where)


@dataclass(frozen=True)
class _LlavaFields:
    model_type: Literal["llava", "mmllm_pooled"]
    text_config: Group
    vision_config: Group
    image_token_index: Annotated[int, Field(ge=0)]
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class MultimodalConfig:
    """`features`: "patch" (every patch of the layer before the last) or "pooled" (CLIP's one image embedding)."""

    vision: VisionConfig = CLIPVisionConfig()
    text: Qwen2Config = Qwen2Config()
    features: str = "patch"
    image_token_id: int = 151655  # <|image_pad|> of Qwen2.5

    def __post_init__(self):
        if self.features not in ("patch", "pooled"):
            raise CheckpointError(f"features {self.features!r}; it can be 'patch' or 'pooled'")

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_patches if self.features == "patch" else 1

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Visual tokens of an image, and features of each before the projector."""
        width = self.vision.hidden_size if self.features == "patch" else self.vision.projection_dim
        return self.num_image_tokens, width

    @classmethod
    def from_dict(cls, config: dict, where: str | Path = "config.json") -> "MultimodalConfig":
        """From a config.json that `to_dict` wrote, or of a LLaVA checkpoint of the same architecture."""
        found = typed(_LlavaFields, {"image_token_index": config.get("image_token_id")} | config, where)
        vision = tower_config(found.vision_config, VISION, f"{where}: vision_config")
        text = {"tie_word_embeddings": found.tie_word_embeddings} | found.text_config
        text = tower_config(text, TEXT, f"{where}: text_config")
        strategy = {"vision_feature_select_strategy": config.get("vision_feature_select_strategy") or "default"}
        refuse_other(config | strategy, LLAVA | {"vision_feature_select_strategy": vision.select_strategy}, where)
        features = "patch" if found.model_type == "llava" else "pooled"
        return cls(vision, text, features, found.image_token_index)

    def to_dict(self) -> dict:
        """The config.json of a saved model: LLaVA's in patch mode; a kind of our own for one pooled token."""
        is_patch = self.features == "patch"
        return {
            "architectures": ["LlavaForConditionalGeneration" if is_patch else "MultimodalLLM"],
            "model_type": "llava" if is_patch else "mmllm_pooled",
            "image_token_index": self.image_token_id,
            "image_seq_length": self.num_image_tokens,
            **LLAVA,
            "vision_feature_select_strategy": self.vision.select_strategy,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "text_config": self.text.to_dict(),
            "vision_config": self.vision.to_dict(),
        }
