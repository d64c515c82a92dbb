"""The whole model: a picture becomes tokens between the words, and the language model goes on from there.

The surprising fact: nothing is added to the vocabulary. Qwen2.5 already has `<|image_pad|>`; it stands once per visual
token in the text, and the projector's outputs take those places.

In patch mode a saved directory is a `LlavaForConditionalGeneration` checkpoint of transformers, names and all.
Paper: LLaVA, https://arxiv.org/abs/2304.08485.

B rows, T tokens, N pictures in the whole batch, S their side, Q visual tokens a picture, D hidden size, V vocabulary,
M labelled positions.
Next: chat.py (what the text looks like), trainer.py, generate.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmllm.chat import IGNORED, ChatProcessor
from mmllm.clip import CLIPVisionConfig, CLIPVisionTower
from mmllm.errors import CheckpointError
from mmllm.projector import Projector
from mmllm.qwen import Qwen2, Qwen2Config

LOGITS_AT_ONCE = 2**26  # numbers in one piece of logits: 256 MiB in float32


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

    @classmethod
    def from_dict(cls, config: dict) -> "MultimodalConfig":
        """Reads the config.json that `to_dict` wrote, or the one of a LLaVA checkpoint of the same architecture."""
        kinds = {"llava": "patch", "mmllm_pooled": "pooled"}
        if config.get("model_type") not in kinds:
            raise CheckpointError(
                f"config.json: model_type {config.get('model_type')!r}; supported: {', '.join(kinds)}"
            )
        fixed = {
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
        }
        for name, wanted in fixed.items():
            if config.get(name, wanted) != wanted:
                raise CheckpointError(f"config.json: {name} is {config[name]!r}; only {wanted!r} is supported")
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
        """The config.json of the saved model: LLaVA's in patch mode; a kind of our own for one pooled token."""
        is_patch = self.features == "patch"
        return {
            "architectures": ["LlavaForConditionalGeneration" if is_patch else "MultimodalLLM"],
            "model_type": "llava" if is_patch else "mmllm_pooled",
            "image_token_index": self.image_token_id,
            "image_seq_length": self.num_image_tokens,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "text_config": self.text.to_dict(),
            "vision_config": self.vision.to_dict(),
        }


class MultimodalLLM(nn.Module):
    """CLIP -> projector -> Qwen2.5. `processor` turns conversations and pictures into its inputs; it is None only in a
    model that was built for its shapes."""

    def __init__(self, config: MultimodalConfig):
        super().__init__()
        self.config = config
        is_pooled = config.features == "pooled"
        self.vision_tower = CLIPVisionTower(config.vision, with_projection=is_pooled)
        width = config.vision.projection_dim if is_pooled else config.vision.hidden_size
        self.multi_modal_projector = Projector(width, config.text.hidden_size)
        self.language_model = Qwen2(config.text)
        self.processor: ChatProcessor | None = None

    @property
    def device(self) -> torch.device:
        return self.multi_modal_projector.linear_1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.multi_modal_projector.linear_1.weight.dtype

    def encode_images(self, pixels_N3SS: Tensor) -> Tensor:
        """Visual tokens, (N, Q, D); N may be 0. A frozen tower runs without a graph."""
        is_frozen = not any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            pixels_N3SS = pixels_N3SS.to(self.device, self.dtype)
            is_patch = self.config.features == "patch"
            features = self.vision_tower.patches(pixels_N3SS) if is_patch else self.vision_tower.pooled(pixels_N3SS)
        return self.multi_modal_projector(features)

    def embed(self, ids_BT: Tensor, pixels_N3SS: Tensor) -> Tensor:
        """Token embeddings (B, T, D) with the pictures' tokens in the places of `image_token_id`, in order."""
        x_BTD = self.language_model.embed(ids_BT)
        image_NQD = self.encode_images(pixels_N3SS)
        is_image_BT = ids_BT == self.config.image_token_id
        places, features = int(is_image_BT.sum()), image_NQD.shape[0] * image_NQD.shape[1]
        if places != features:  # masked_scatter would take too many features without a word
            raise ValueError(
                f"{places} image places in the text for {len(image_NQD)} pictures of {image_NQD.shape[1]} tokens"
            )
        return x_BTD.masked_scatter(is_image_BT[:, :, None], image_NQD.to(x_BTD.dtype))

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, pixels_N3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies (float32) and number of the labelled positions.

        `labels_BT[b, t]` is the token at t, to be foretold from t - 1, or IGNORED. Rows are padded on the right.
        The caller divides: only it knows all the targets of its optimiser step.
        """
        x_BTD = self.language_model(self.embed(ids_BT, pixels_N3SS))
        is_target = labels_BT[:, 1:] != IGNORED
        x_MD, targets_M = x_BTD[:, :-1][is_target], labels_BT[:, 1:][is_target]
        return self.loss_sum(x_MD, targets_M), is_target.sum()

    def loss_sum(self, x_MD: Tensor, targets_M: Tensor) -> Tensor:
        """Summed cross-entropy. When it takes several pieces of logits, the backward pass makes each again."""
        rows = max(1, LOGITS_AT_ONCE // self.config.text.vocab_size)
        if len(x_MD) <= rows:
            return self._cross_entropy(x_MD, targets_M)
        pieces = zip(x_MD.split(rows), targets_M.split(rows), strict=True)
        return sum(checkpoint(self._cross_entropy, x, targets, use_reentrant=False) for x, targets in pieces)

    def _cross_entropy(self, x_MD: Tensor, targets_M: Tensor) -> Tensor:
        return F.cross_entropy(self.language_model.logits(x_MD), targets_M, reduction="sum")

    def logits(self, ids_BT: Tensor, pixels_N3SS: Tensor) -> Tensor:
        """Logits of every position, (B, T, V) float32, for rows padded on the right."""
        return self.language_model.logits(self.language_model(self.embed(ids_BT, pixels_N3SS)))
