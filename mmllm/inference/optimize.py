"""A model made ready for answering: loaded in a precision, its layers packed, its step cut to what has to be done.

The surprising fact: of the 25 ms that a token took in int8, three went into 49 norms and two dozen small operations a
layer, each of which costs torch more to start than to do.

The network's files know nothing of this: layers are replaced on the built model, or their `forward` on the instance.

    float32        nothing is rounded
    bfloat16       on a CPU the weights alone, where our kernels run (kernels.py); on a GPU everything
    int8           the weights of both towers' linear layers, one scale a row, and of embedding and head
    int8-dynamic   the language model's activations too: faster with many rows, at twice the divergence (README)
    int4           experimental: the language model's layers with a scale for 32 weights; the rest as in int8

T tokens, D hidden size. Next: pipeline.py.
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
from mmllm.layers.lora import merge_lora_
from mmllm.layers.packed import (
    BITS,
    Bf16Packed,
    Bf16Prepacked,
    Int4Packed,
    Int8Packed,
    pack_,
    replace_linear_,
    side_by_side,
    to_device_layout_,
)
from mmllm.models.kv_cache import PerSlot
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen import Cache, Qwen2Attention, Qwen2MLP, RMSNorm


def load_model(source: str | Path, *, device: str | torch.device = "cpu", precision: str = "float32") -> MultimodalLLM:
    """The model of a directory in one of PRECISIONS, ready to answer and no more to be trained.

    Adapters are added to weights that can take them. UserError for a precision that the device or the directory has not.
    """
    device = torch.device(device)
    refuse_impossible(precision, device)
    is_float = precision == "float32" or (precision == "bfloat16" and device.type != "cpu")
    dtype = getattr(torch, precision) if is_float else None
    model = MultimodalLLM.from_pretrained(source, device=device, dtype=dtype)
    if model.form.is_packed and precision not in BITS:
        raise UserError(f"{source}: its weights are int8, not {precision}; use dtype int8 or int8-dynamic")
    fold_where_possible_(model)
    if not is_float:
        pack_towers_(model, precision)
        convert_rest_(model)
        if device.type == "cpu" and kernels.native():
            fuse_(model)
    model.form = replace(model.form, precision=precision)
    return model


def make_int8_(model: MultimodalLLM) -> None:
    """Makes a model int8 that `save_pretrained` shall write, for answering."""
    fold_where_possible_(model)
    pack_towers_(model, "int8")


def fold_where_possible_(model: MultimodalLLM) -> None:
    """Adds adapters to float weights; beside int8 ones they stay, as the rounding would swallow them."""
    if model.form.lora and not model.form.rounding and not model.form.is_packed:
        merge_lora_(model.language_model)
        model.form = replace(model.form, lora=None)


def refuse_impossible(precision: str, device: torch.device) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"dtype {precision!r}; it can be {', '.join(PRECISIONS)}")
    possible = {"cpu": PRECISIONS, "cuda": ("float32", "bfloat16", "int8")}.get(device.type, ("float32", "bfloat16"))
    if precision not in possible:
        raise UserError(f"dtype {precision} does not run on {device.type}; it can be {', '.join(possible)}")


@torch.no_grad()
def pack_towers_(model: MultimodalLLM, precision: str) -> None:
    """Packs the linear layers of both towers; the vision tower is int8 where the language model is int8 or int4."""
    if model.form.is_packed:
        to_device_layout_(model, BITS["int8"])
        to_device_layout_(model.language_model, BITS[precision])
    elif precision == "bfloat16":
        make = Bf16Packed if kernels.native() else Bf16Prepacked
        replace_linear_(model.vision_tower, make)
        if kernels.native():
            pack_(model.language_model, make, make)
        else:
            replace_linear_(model.language_model, make)
    else:
        int8 = partial(Int8Packed.of, bits=BITS.get(precision, BITS["int8"]))
        pack_(model.language_model, Int4Packed.of if precision == "int4" else int8, int8)
        replace_linear_(model.vision_tower, Int8Packed.of)
    model.form = replace(model.form, rounding=None, is_packed=precision not in ("bfloat16", "int4"))


@torch.no_grad()
def convert_rest_(model: MultimodalLLM) -> None:
    """The rest in float32, on a GPU in bfloat16."""
    is_cpu = model.device.type == "cpu"
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if is_cpu else torch.bfloat16)


# The step -------------------------------------------------------------------------------------------------------------


def fuse_(model: MultimodalLLM) -> None:
    """Replaces forward passes by what takes fewer operations, where our kernels run."""
    language_model, embeddings = model.language_model, model.vision_tower.vision_model.embeddings
    for module in language_model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(short_norm, module)
        elif isinstance(module, Qwen2MLP) and module.down_proj.in_features % 16 == 0:
            module.forward = partial(short_mlp, module)
        elif isinstance(module, Qwen2Attention) and module.head_dim % 16 == 0 and module.head_dim <= 256:
            module.forward = partial(short_attention, module)
    embeddings.patch_embedding.forward = partial(short_patches, embeddings.patch_embedding)


def short_patches(convolution: nn.Conv2d, pixels_B3SS: Tensor) -> Tensor:
    """A convolution whose windows do not overlap is one matrix product, (B, D, S/P, S/P): a quarter of the time."""
    side = convolution.kernel_size[0]
    windows = pixels_B3SS.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(windows, convolution.weight.flatten(1)).permute(0, 3, 1, 2)


def short_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return torch.ops.mmllm.rms_norm(x, norm.weight, norm.eps)


def short_mlp(mlp: Qwen2MLP, x_BTD: Tensor) -> Tensor:
    return mlp.down_proj(torch.ops.mmllm.swiglu(side_by_side((mlp.gate_proj, mlp.up_proj), x_BTD)))


def short_attention(
    attention: Qwen2Attention,
    x_BTD: Tensor,
    rope: tuple[Tensor, Tensor],
    attend_B1TS: Tensor | None,
    cache: Cache | None,
) -> Tensor:
    """One token a row, as in decoding: projections in one call; turning, caching and attending in another."""
    if x_BTD.shape[1] > 1 or not isinstance(cache, PerSlot):
        return Qwen2Attention.forward(attention, x_BTD, rope, attend_B1TS, cache)
    qkv_B1N = side_by_side((attention.q_proj, attention.k_proj, attention.v_proj), x_BTD)
    slots, starts = zip(*cache.places, strict=True)
    keys_SGCK, values_SGCK = cache.cache.keys[attention.layer], cache.cache.values[attention.layer]
    y_BD = torch.ops.mmllm.attend_token(qkv_B1N, *rope, keys_SGCK, values_SGCK, slots, starts)
    return attention.o_proj(y_BD[:, None])
