"""A model prepared for answering: loaded in a precision, its layers packed, its decoding step cut to fewer operations.

The model's own files do not know of this: layers of the built model are replaced, or their `forward` on the instance. Of
the 25 ms of an int8 token, three went into norms and small operations that torch takes longer to start than to do.

    float32        nothing is rounded
    bfloat16       on a CPU with our kernels only the weights are rounded; elsewhere everything
    int8           the linear layers of both towers, one scale per row, and the embedding and head
    int8-dynamic   the language model's activations too: faster with many rows, at twice the divergence
    int4           experimental: the language model's layers with one scale per 32 weights; the rest as in int8

T tokens, D hidden size, P patch size, S image side.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.config.schema import PRECISIONS
from mmllm.errors import UserError
from mmllm.kernels import cpu as kernels
from mmllm.layers import packed
from mmllm.layers.lora import merge_lora_
from mmllm.models.kv_cache import PerSlot
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen import Cache, Qwen2Attention, Qwen2MLP, RMSNorm
from mmllm.models.qwen3 import Qwen3Attention

PRECISIONS_ON = {"cpu": PRECISIONS, "cuda": ("float32", "bfloat16", "int8"), "mps": ("float32", "bfloat16")}


def load_model(source: str | Path, *, device: str | torch.device = "cpu", precision: str = "float32") -> MultimodalLLM:
    """The model of a directory in one of PRECISIONS, prepared for answering; it can no longer be trained or saved.

    UserError for a precision that the device or the directory does not support.
    """
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise UserError(f"dtype {precision!r}; it can be {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS_ON[device.type]:
        raise UserError(
            f"dtype {precision} does not run on {device.type}; it can be {', '.join(PRECISIONS_ON[device.type])}"
        )
    is_float = precision == "float32" or (precision == "bfloat16" and not (device.type == "cpu" and kernels.native()))
    model = MultimodalLLM.from_pretrained(source, device=device, dtype=getattr(torch, precision) if is_float else None)
    if model.form.is_packed and precision not in packed.BITS:
        raise UserError(f"{source}: its weights are int8, not {precision}; use dtype int8 or int8-dynamic")
    merge_where_possible_(model)
    if not is_float:
        pack_towers_(model, precision)
        cast_rest_(model)
        if device.type == "cpu" and kernels.native():
            fuse_(model)
    model.form = replace(model.form, precision=precision)
    return model


def make_int8_(model: MultimodalLLM) -> None:
    """Makes a float model int8, for `save_pretrained` to write a directory that only answers."""
    merge_where_possible_(model)
    pack_towers_(model, "int8")


def merge_where_possible_(model: MultimodalLLM) -> None:
    """Merges adapters into float weights; on rounded weights they stay, as rounding would lose them."""
    form = model.form
    if form.lora and not form.rounding and not form.is_packed:
        merge_lora_(model.language_model)
        model.form = replace(form, lora=None)


@torch.no_grad()
def pack_towers_(model: MultimodalLLM, precision: str) -> None:
    """Packs the linear layers of both towers; the vision tower is int8 where the language model is int8 or int4."""
    if model.form.is_packed:
        packed.to_device_layout_(model, packed.BITS["int8"])
        packed.to_device_layout_(model.language_model, packed.BITS[precision])
    elif precision == "bfloat16":
        packed.replace_linear_(model.vision_tower, packed.Bf16Packed)
        packed.pack_(model.language_model, packed.Bf16Packed, packed.Bf16Packed)
    else:
        int8 = partial(packed.Int8Packed.of, bits=packed.BITS.get(precision, packed.BITS["int8"]))
        packed.pack_(model.language_model, packed.Int4Packed if precision == "int4" else int8, int8)
        packed.replace_linear_(model.vision_tower, packed.Int8Packed.of)
    model.form = replace(model.form, rounding=None, is_packed=precision not in ("bfloat16", "int4"))


def cast_rest_(model: MultimodalLLM) -> None:
    """Casts what is not packed to float32, on a GPU to bfloat16."""
    dtype = torch.float32 if model.device.type == "cpu" else torch.bfloat16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


# Forward passes of fewer operations, for our CPU kernels --------------------------------------------------------------


def fuse_(model: MultimodalLLM) -> None:
    """Replaces forward passes of the decoding step and of the patch embedding."""
    for module in model.language_model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(fused_norm, module)
        elif isinstance(module, Qwen2MLP) and module.down_proj.in_features % 16 == 0:
            module.forward = partial(fused_mlp, module)
        elif isinstance(module, Qwen2Attention) and module.head_dim % 16 == 0 and module.head_dim <= 256:
            module.forward = partial(fused_attention, module)
    convolution = model.vision_tower.vision_model.embeddings.patch_embedding
    convolution.forward = partial(embed_patches, convolution)


def is_fused(language_model: nn.Module) -> bool:
    """Whether `fuse_` has replaced the forward pass of every norm, MLP and attention."""
    parts = (RMSNorm, Qwen2MLP, Qwen2Attention)
    return all("forward" in vars(module) for module in language_model.modules() if isinstance(module, parts))


def embed_patches(convolution: nn.Conv2d, pixels_B3SS: Tensor) -> Tensor:
    """A convolution of windows that do not overlap as one matrix product, (B, D, S/P, S/P): a quarter of the time."""
    side = convolution.kernel_size[0]
    windows = pixels_B3SS.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(windows, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def fused_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return torch.ops.mmllm.rms_norm(x, norm.weight, norm.eps)


def fused_mlp(mlp: Qwen2MLP, x_BTD: Tensor) -> Tensor:
    return mlp.down_proj(torch.ops.mmllm.swiglu(packed.side_by_side((mlp.gate_proj, mlp.up_proj), x_BTD)))


def fused_attention(
    attention: Qwen2Attention,
    x_BTD: Tensor,
    rope: tuple[Tensor, Tensor],
    attend_B1TS: Tensor | None,
    cache: Cache | None,
) -> Tensor:
    """With one token per row, as in decoding: one call for the projections, one for rotation, cache and attention."""
    if x_BTD.shape[1] > 1 or not isinstance(cache, PerSlot):
        return Qwen2Attention.forward(attention, x_BTD, rope, attend_B1TS, cache)
    qkv_B1N = packed.side_by_side((attention.q_proj, attention.k_proj, attention.v_proj), x_BTD)
    if isinstance(attention, Qwen3Attention):
        heads = attention.q_proj.out_features // attention.head_dim, attention.k_proj.out_features // attention.head_dim
        q_B1HK, k_B1GK, v_B1GK = qkv_B1N.unflatten(-1, (-1, attention.head_dim)).split([*heads, heads[1]], dim=-2)
        qkv_B1N = torch.cat([*attention.normalised(q_B1HK, k_B1GK), v_B1GK], dim=-2).flatten(2)
    slots, starts = zip(*cache.rows, strict=True)
    keys_SGCK, values_SGCK = cache.cache.keys[attention.layer], cache.cache.values[attention.layer]
    y_BD = torch.ops.mmllm.attend_token(qkv_B1N, *rope, keys_SGCK, values_SGCK, slots, starts)
    return attention.o_proj(y_BD[:, None])
