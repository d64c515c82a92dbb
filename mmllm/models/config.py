"""Sizes of the two towers and of the whole model, under the names of the official config.json files."""

from dataclasses import asdict, dataclass, fields

from mmllm.errors import CheckpointError
from mmllm.runtime.files import refuse_other

ACTIVATIONS = ("quick_gelu", "gelu")  # LAION's CLIPs use the exact one
LLAVA = {  # what the architecture fixes of LLaVA's settings
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The vision tower; the defaults are ViT-B/32."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise CheckpointError(f"CLIP config: hidden_act {self.hidden_act!r}; supported: {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size:
            raise CheckpointError(
                f"CLIP config: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}, image_size {self.image_size} of patch_size {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config: dict) -> "CLIPVisionConfig":
        """From a CLIP config.json or its vision part; absent fields mean ViT-B/32, as in the official files."""
        vision = config.get("vision_config", config)
        values = {field.name: vision[field.name] for field in fields(cls) if field.name in vision}
        if "vision_config" in config and "projection_dim" in config:
            values["projection_dim"] = config["projection_dim"]
        return cls(**values)

    def to_dict(self) -> dict:
        return {"model_type": "clip_vision_model", "num_channels": 3, **asdict(self)}


@dataclass(frozen=True)
class Qwen2Config:
    """The language model; the defaults are Qwen2.5-0.5B."""

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32768

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise CheckpointError(
                f"Qwen2 config: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}, and head_dim {self.head_dim} even"
            )

    @classmethod
    def from_dict(cls, config: dict) -> "Qwen2Config":
        """From a config.json as published or as transformers 5 writes it; refuses what would change the numbers."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"Qwen2 config: rope scaling {kind!r} is not supported; use the plain model")
        refuse_other(config, {"use_sliding_window": False, "hidden_act": "silu"}, "Qwen2 config")
        missing = [name for name in ("vocab_size", "hidden_size", "num_attention_heads") if name not in config]
        if missing:
            raise CheckpointError(
                f"Qwen2 config: {', '.join(missing)} missing; is it the config.json of a Qwen2 model?"
            )
        values = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        values.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        values.setdefault("num_key_value_heads", config["num_attention_heads"])
        values.setdefault("tie_word_embeddings", False)  # the default of the format
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        return cls(**values)

    def to_dict(self) -> dict:
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", **asdict(self)}


@dataclass(frozen=True)
class MultimodalConfig:
    """`features`: "patch" (every patch of the layer before the last) or "pooled" (CLIP's one image embedding)."""

    vision: CLIPVisionConfig = CLIPVisionConfig()
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
    def from_dict(cls, config: dict) -> "MultimodalConfig":
        """From a config.json that `to_dict` wrote, or of a LLaVA checkpoint of the same architecture."""
        kinds = {"llava": "patch", "mmllm_pooled": "pooled"}
        if config.get("model_type") not in kinds:
            raise CheckpointError(
                f"config.json: model_type {config.get('model_type')!r}; supported: {', '.join(kinds)}"
            )
        refuse_other(config, LLAVA, "config.json")
        for part, kind in (("text_config", "qwen2"), ("vision_config", "clip_vision_model")):
            found = config.get(part, {}).get("model_type")
            if found != kind:
                raise CheckpointError(f"config.json: {part}.model_type is {found!r}; only {kind!r} is supported")
        token = config.get("image_token_index", config.get("image_token_id"))
        if token is None:
            raise CheckpointError("config.json: image_token_index is missing")
        text = dict(config["text_config"])
        text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
        vision, text = CLIPVisionConfig.from_dict(config["vision_config"]), Qwen2Config.from_dict(text)
        return cls(vision, text, kinds[config["model_type"]], token)

    def to_dict(self) -> dict:
        """The config.json of a saved model: LLaVA's in patch mode; a kind of our own for one pooled token."""
        is_patch = self.features == "patch"
        return {
            "architectures": ["LlavaForConditionalGeneration" if is_patch else "MultimodalLLM"],
            "model_type": "llava" if is_patch else "mmllm_pooled",
            "image_token_index": self.image_token_id,
            "image_seq_length": self.num_image_tokens,
            **LLAVA,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "text_config": self.text.to_dict(),
            "vision_config": self.vision.to_dict(),
        }
