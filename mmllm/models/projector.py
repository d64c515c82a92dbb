"""The only new weights: two linear layers that turn image features into token embeddings.

Paper: LLaVA 1.5, https://arxiv.org/abs/2310.03744 (`mlp2x_gelu`).
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """(..., in_features) -> (..., hidden_size)."""

    def __init__(self, in_features: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))
