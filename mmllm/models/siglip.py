"""SigLIP's image encoder: pixels to features. SigLIP2's models of a fixed image size have the same network.

It is CLIP's but for this: no class token, no norm before the layers, a bias in the patch embedding, and GELU in its tanh
form. One vector for the image (`pooled`) comes from a learned query that attends to all patches.

Names and arithmetic are those of the published checkpoints.
Paper: https://arxiv.org/abs/2303.15343; code: https://github.com/google-research/big_vision (models/vit.py).

B images of side S, N patches, D hidden size, H heads, K = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.models.clip import CLIPMLP, CLIPEncoder
from mmllm.models.config import SigLIPVisionConfig


class SigLIPEmbeddings(nn.Module):
    """A linear projection of each patch, row by row, plus a learned position."""

    def __init__(self, config: SigLIPVisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        return self.patch_embedding(pixels_B3SS).flatten(2).transpose(1, 2) + self.position_embedding.weight


class ProbeAttention(nn.Module):
    """Multi-head attention with the packed projection of torch's `nn.MultiheadAttention`, for one query."""

    def __init__(self, config: SigLIPVisionConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * size))
        self.out_proj = nn.Linear(size, size)
        nn.init.normal_(self.in_proj_weight, std=size**-0.5)

    def forward(self, query_B1D: Tensor, x_BND: Tensor) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q_BH1K, k_BHNK, v_BHNK = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query_B1D, x_BND, x_BND), weights, biases, strict=True)
        )
        return self.out_proj(F.scaled_dot_product_attention(q_BH1K, k_BHNK, v_BHNK).transpose(1, 2).flatten(2))


class SigLIPHead(nn.Module):
    """One vector for the image, (B, 1, D), by attention of a learned query."""

    def __init__(self, config: SigLIPVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = ProbeAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x_BND: Tensor) -> Tensor:
        y_B1D = self.attention(self.probe.to(x_BND.dtype).expand(len(x_BND), -1, -1), x_BND)
        return y_B1D + self.mlp(self.layernorm(y_B1D))


class SigLIPVisionTransformer(nn.Module):
    def __init__(self, config: SigLIPVisionConfig):
        super().__init__()
        self.embeddings = SigLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = SigLIPHead(config)

    def hidden_state(self, pixels_B3SS: Tensor, num_layers: int) -> Tensor:
        """The patches after the first `num_layers` layers, without a final norm: (B, N, D)."""
        x_BND = self.embeddings(pixels_B3SS)
        for layer in self.encoder.layers[:num_layers]:
            x_BND = layer(x_BND)
        return x_BND


class SigLIPVisionTower(nn.Module):
    """The published vision tower, with the interface of `CLIPVisionTower`; it has its head either way."""

    def __init__(self, config: SigLIPVisionConfig, with_projection: bool):
        super().__init__()
        self.config = config
        self.vision_model = SigLIPVisionTransformer(config)

    def patches(self, pixels_B3SS: Tensor) -> Tensor:
        """Features of every patch, row by row, from the layer before the last: (B, N, D)."""
        return self.vision_model.hidden_state(pixels_B3SS, self.config.num_hidden_layers - 1)

    def pooled(self, pixels_B3SS: Tensor) -> Tensor:
        """SigLIP's image embedding as one token, not normalised: (B, 1, D)."""
        x_BND = self.vision_model.hidden_state(pixels_B3SS, self.config.num_hidden_layers)
        return self.vision_model.head(self.vision_model.post_layernorm(x_BND))
