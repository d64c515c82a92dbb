"""Qwen2.5: embeddings to logits.

It is Llama with biases in the query, key and value projections. Some key biases are large: without them, as in common
int8 code, the model almost works.

Names and arithmetic are those of the published checkpoints.
Paper: https://arxiv.org/abs/2412.15115; code: https://github.com/huggingface/transformers (models/qwen2/modeling_qwen2.py).

B rows, T tokens, S positions attended to, D hidden size, H query heads, G key/value heads, K head size, V vocabulary,
M positions of the batch.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.models.config import Qwen2Config


class Cache(Protocol):
    """Keys and values of earlier tokens. `attend` adds a layer's new ones and returns the attention over all of them."""

    def attend(self, layer: int, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor: ...


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = at_least_float32(x)
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rope_tables(config: Qwen2Config, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions' angles, float32, (B, 1, T, K); the sines of the first half are negative.

    Computed in each forward pass: a buffer would be rounded by `.to(bfloat16)`, which adds half as much error again.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions_BT.device).float() / config.head_dim
    angles = positions_BT[:, None, :, None].float() * (1.0 / config.rope_theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (k, k + K/2) by its position's angle: RoPE, https://arxiv.org/abs/2104.09864, in half-split form."""
    swapped = x_BHTK.roll(x_BHTK.shape[-1] // 2, -1)
    return torch.addcmul(x_BHTK * cos.to(x_BHTK.dtype), swapped, sin.to(x_BHTK.dtype))


class Qwen2Attention(nn.Module):
    """Grouped-query attention: H/G neighbouring query heads share a key/value head."""

    def __init__(self, config: Qwen2Config, layer: int, *, bias: bool = True):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def normalised(self, q_BTHK: Tensor, k_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys before the rotation: as they are. Qwen3 normalises them."""
        return q_BTHK, k_BTGK

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], attend_B1TS: Tensor | None, cache: Cache | None
    ) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHTK, k_BGTK, v_BGTK = (heads.transpose(1, 2) for heads in (*self.normalised(q_BTHK, k_BTGK), v_BTGK))
        q_BHTK, k_BGTK = rotate(q_BHTK, *rope), rotate(k_BGTK, *rope)
        if cache is not None:
            y_BHTK = cache.attend(self.layer, q_BHTK, k_BGTK, v_BGTK)
        else:
            if attend_B1TS is not None:  # CUDA's fast kernels take a mask or shared heads, not both
                groups = q_BHTK.shape[1] // k_BGTK.shape[1]
                k_BGTK, v_BGTK = k_BGTK.repeat_interleave(groups, 1), v_BGTK.repeat_interleave(groups, 1)
            y_BHTK = F.scaled_dot_product_attention(
                q_BHTK, k_BGTK, v_BGTK, attn_mask=attend_B1TS, is_causal=attend_B1TS is None, enable_gqa=True
            )
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs for the backward pass and recomputes silu(gate) there."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(of_y * up, gate), of_y * F.silu(gate)


class Qwen2MLP(nn.Module):
    """SwiGLU, https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


class Qwen2Layer(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int, attention: type[Qwen2Attention]):
        super().__init__()
        self.self_attn = attention(config, layer)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        attend_B1TS: Tensor | None,
        cache: Cache | None,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, attend_B1TS, cache)
        x = x_BTD if keep is None else x_BTD[keep]
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2Model(nn.Module):
    def __init__(self, config: Qwen2Config, attention: type[Qwen2Attention]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2Layer(config, i, attention) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen2(nn.Module):
    """The published language model.

    `embed`, the forward pass and `logits` are separate: visual tokens are inserted after the first, and a caller computes
    only those logits that it needs.
    """

    def __init__(self, config: Qwen2Config, attention: type[Qwen2Attention] = Qwen2Attention):
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config, attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head the embedding where the configuration says so; needed after every load that assigns."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids_BT: Tensor) -> Tensor:
        return self.model.embed_tokens(ids_BT)

    def forward(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor | None = None,
        *,
        attend_BTS: Tensor | None = None,
        cache: Cache | None = None,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D). With `keep` = (rows (M), positions (M)) only those, (M, D), which
        skips the last MLP for the others.

        Attention is causal and positions are 0 .. T-1, which is right for rows padded on the right. `attend_BTS` (True:
        may attend) replaces the causal mask. With a `cache` (kv_cache.py) tokens also attend to earlier ones.
        """
        if positions_BT is None:
            positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[:2])
        attend_B1TS = None if attend_BTS is None else attend_BTS[:, None]
        rope = rope_tables(self.config, positions_BT)
        *layers, last = self.model.layers
        for layer in layers:
            x_BTD = layer(x_BTD, rope, attend_B1TS, cache)
        return self.model.norm(last(x_BTD, rope, attend_B1TS, cache, keep))

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V), float32."""
        return at_least_float32(self.lm_head(x))
