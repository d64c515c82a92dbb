"""CLIP's text tower as one function over a published file's tensors: only `mmllm verify` needs it.

Names and arithmetic are transformers' (models/clip/modeling_clip.py). C texts of T tokens, D hidden size, P projection size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.models.clip import ACTIVATIONS


def text_embeddings(tensors: dict[str, Tensor], ids_CT: Tensor, num_heads: int, activation: str) -> Tensor:
    """CLIP's embeddings of texts, (C, P), not normalised. Texts are padded on the right with their last token, the end."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float())

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
        return F.layer_norm(x, weight.shape, weight, bias)

    names = "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"
    tokens, positions = (tensors[name].float() for name in names)
    x_CTD = tokens[ids_CT] + positions[: ids_CT.shape[1]]
    layer = 0
    while (prefix := f"text_model.encoder.layers.{layer}") + ".mlp.fc1.weight" in tensors:
        y_CTD = norm(f"{prefix}.layer_norm1", x_CTD)
        q, k, v = (
            linear(f"{prefix}.self_attn.{part}_proj", y_CTD).unflatten(-1, (num_heads, -1)).transpose(1, 2)
            for part in "qkv"
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x_CTD = x_CTD + linear(f"{prefix}.self_attn.out_proj", attended)
        y_CTD = ACTIVATIONS[activation](linear(f"{prefix}.mlp.fc1", norm(f"{prefix}.layer_norm2", x_CTD)))
        x_CTD = x_CTD + linear(f"{prefix}.mlp.fc2", y_CTD)
        layer += 1
    ends_C = ids_CT.argmax(dim=1)  # the end of text has the highest id; argmax is the first
    x_CD = norm("text_model.final_layer_norm", x_CTD)[torch.arange(len(ids_CT)), ends_C]
    return x_CD @ tensors["text_projection.weight"].float().T
