"""CLIP's image encoder: pixels to features.

The last layer is trained to fill one vector for the whole image (`pooled`). The layer before it still has features of
every patch (`patches`), and a language model answers better from those, as LLaVA found.

Names and arithmetic are those of the published checkpoints, the spelling `pre_layrnorm` included.
Paper: https://arxiv.org/abs/2103.00020; code: https://github.com/openai/CLIP (clip/model.py).

B images of side S, N patches, T = N + 1 tokens (the class token first), D hidden size, H heads, K = D / H,
P projection size.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.models.config import CLIPVisionConfig, VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)  # the sigmoid approximation that OpenAI's CLIP was trained with


ACTIVATIONS = {  # by hidden_act
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class CLIPAttention(nn.Module):
    """Multi-head attention of every token to every token."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            project(x_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK)
        return self.out_proj(y_BHTK.transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_BTD)))


class CLIPLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD))
        return x_BTD + self.mlp(self.layer_norm2(x_BTD))


class CLIPEmbeddings(nn.Module):
    """A linear projection of each patch, row by row, after the class token; plus a learned position."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        x_BND = self.patch_embedding(pixels_B3SS).flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.to(x_BND.dtype).expand(len(x_BND), 1, -1)
        return torch.cat([class_B1D, x_BND], dim=1) + self.position_embedding.weight


class CLIPEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))


class CLIPVisionTransformer(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def hidden_state(self, pixels_B3SS: Tensor, num_layers: int) -> Tensor:
        """The tokens after the first `num_layers` layers, without a final norm: (B, T, D)."""
        x_BTD = self.pre_layrnorm(self.embeddings(pixels_B3SS))
        for layer in self.encoder.layers[:num_layers]:
            x_BTD = layer(x_BTD)
        return x_BTD


class CLIPVisionTower(nn.Module):
    """The published vision tower, with or without the projection into CLIP's common space of images and texts.

    Pixels are (B, 3, S, S) float, S = `config.image_size`, normalised as image.py does; B may be 0.
    """

    def __init__(self, config: CLIPVisionConfig, with_projection: bool):
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionTransformer(config)
        if with_projection:
            self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def patches(self, pixels_B3SS: Tensor) -> Tensor:
        """Features of every patch, row by row, from the layer before the last: (B, N, D)."""
        return self.vision_model.hidden_state(pixels_B3SS, self.config.num_hidden_layers - 1)[:, 1:]

    def pooled(self, pixels_B3SS: Tensor) -> Tensor:
        """CLIP's image embedding as one token, not normalised: (B, 1, P)."""
        class_B1D = self.vision_model.hidden_state(pixels_B3SS, self.config.num_hidden_layers)[:, :1]
        return self.visual_projection(self.vision_model.post_layernorm(class_B1D))
