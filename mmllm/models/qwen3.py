"""Qwen3's dense language models: embeddings to logits.

They are Qwen2.5 but for the attention: no biases, and each head's query and key is normalised before it is rotated.

Names and arithmetic are those of the published checkpoints.
Paper: https://arxiv.org/abs/2505.09388; code: https://github.com/huggingface/transformers (models/qwen3/modeling_qwen3.py).
"""

from torch import Tensor

from mmllm.models.config import Qwen3Config
from mmllm.models.qwen import Qwen2, Qwen2Attention, RMSNorm


class Qwen3Attention(Qwen2Attention):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__(config, layer, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def normalised(self, q_BTHK: Tensor, k_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q_BTHK), self.k_norm(k_BTGK)


class Qwen3(Qwen2):
    """The published language model, with the interface of `Qwen2`."""

    def __init__(self, config: Qwen3Config):
        super().__init__(config, Qwen3Attention)
