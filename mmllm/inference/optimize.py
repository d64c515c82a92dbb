"""A model prepared for answering: loaded in a precision, its layers packed, its forward pass one call of our kernels.

The model's own files do not know of this: layers of the built model are replaced.

    float32        nothing is rounded
    bfloat16       on a CPU with our kernels only the weights are rounded; elsewhere everything
    int8           the linear layers of both towers, one scale per row, and the embedding and head
    int8-dynamic   the language model's activations too: faster with many rows, at twice the divergence
    int4           the language model's layers with one scale per 32 weights; the rest as in int8

T tokens, D hidden size, P patch size, S image side.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.config.schema import PRECISIONS
from mmllm.data.batches import make_batch, read_rows
from mmllm.data.samples import Sample
from mmllm.errors import UserError
from mmllm.kernels import cpu as kernels
from mmllm.layers import packed
from mmllm.layers.lora import has_adapter, merge_lora_
from mmllm.layers.quantized import linear_layers
from mmllm.models.multimodal import MultimodalLLM
from mmllm.models.qwen import Qwen2, RMSNorm

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
    if (stored := model.form.packed) and not precision.startswith(stored):
        possible = " or ".join(name for name in PRECISIONS if name.startswith(stored))
        raise UserError(f"{source}: its weights are {stored}, not {precision}; use dtype {possible}")
    merge_where_possible_(model)
    if not is_float:
        pack_towers_(model, precision, {})
        cast_rest_(model)
        if device.type == "cpu":
            convolution = model.vision_tower.vision_model.embeddings.patch_embedding
            convolution.forward = partial(embed_patches, convolution)
    model.form = replace(model.form, precision=precision)
    return model


def make_packed_(model: MultimodalLLM, precision: str, samples: Sequence[Sample] = ()) -> None:
    """Makes a float model int8 or int4, for `save_pretrained` to write a directory that only answers.

    int4 is rounded for what the layers read in `samples`, if any; the model is in float32 then.
    """
    merge_where_possible_(model)
    pack_towers_(model, precision, second_moments(model, samples))


@torch.no_grad()
def second_moments(model: MultimodalLLM, samples: Sequence[Sample]) -> dict[nn.Module, Tensor]:
    """x^T x, (K, K), of all rows x that each linear layer of the language model reads in `samples`."""
    moments: dict[nn.Module, Tensor] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        x_MK = inputs[0].flatten(0, -2)
        moments[layer] = moments.get(layer, 0) + x_MK.T @ x_MK

    hooks = [layer.register_forward_hook(add) for layer in linear_layers(model.language_model).values()]
    for sample in samples:
        model(*vars(make_batch(read_rows(sample, model.processor), model.processor)).values())
    for hook in hooks:
        hook.remove()
    return moments


def merge_where_possible_(model: MultimodalLLM) -> None:
    """Merges adapters into float weights; on rounded weights they stay, as rounding would lose them."""
    form = model.form
    if form.lora and not form.rounding and not form.packed:
        merge_lora_(model.language_model)
        model.form = replace(form, lora=None)


@torch.no_grad()
def pack_towers_(model: MultimodalLLM, precision: str, moments: dict[nn.Module, Tensor]) -> None:
    """Packs the linear layers of both towers; the vision tower is int8 where the language model is int8 or int4."""
    bits = packed.BITS.get(precision, packed.BITS["int8"])
    if model.form.packed:
        packed.to_device_layout_(model)
        packed.to_device_layout_(model.language_model, bits)
    elif precision == "bfloat16":
        packed.replace_linear_(model.vision_tower, packed.Bf16Packed)
        packed.pack_(model.language_model, packed.Bf16Packed, packed.Bf16Packed)
    else:
        int8 = partial(packed.Int8Packed.of, bits=bits)
        int4 = partial(packed.Int4Packed.of, moments=moments)
        packed.pack_(model.language_model, int4 if precision == "int4" else int8, int8)
        packed.replace_linear_(model.vision_tower, packed.Int8Packed.of)
    model.form = replace(model.form, rounding=None, packed=precision.removesuffix("-dynamic"))


def cast_rest_(model: MultimodalLLM) -> None:
    """Casts what is not packed to float32, on a GPU to bfloat16."""
    dtype = torch.float32 if model.device.type == "cpu" else torch.bfloat16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def embed_patches(convolution: nn.Conv2d, pixels_B3SS: Tensor) -> Tensor:
    """A convolution of windows that do not overlap as one matrix product, (B, D, S/P, S/P): a quarter of the time."""
    side = convolution.kernel_size[0]
    windows = pixels_B3SS.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(windows, convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def step_of(language_model: Qwen2) -> torch.ScriptObject | None:
    """The model's forward pass as one call of our kernels (`Step` in cpu.cpp), in which no row changes another's bits.

    None where it is not one: without our kernels, with adapters, in float32, or with heads of an odd size.
    """
    layers, head_dim = language_model.model.layers, language_model.config.head_dim
    linears = [module for layer in layers for part in (layer.self_attn, layer.mlp) for module in part.children()]
    linears = [*(module for module in linears if not isinstance(module, RMSNorm)), language_model.lm_head]
    is_ours = all(isinstance(each, packed.Packed) and not each.mixes_rows and not has_adapter(each) for each in linears)
    if not (is_ours and packed.is_native(linears[0].panels) and head_dim % 16 == 0 and head_dim <= 256):
        return None
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(language_model.model.norm)
    norms += [norm for layer in layers for norm in layer.self_attn.children() if isinstance(norm, RMSNorm)]
    return torch.classes.mmllm.Step(
        [linear.panels for linear in linears],
        [linear.scale for linear in linears],
        [linear.bias for linear in linears],
        [linear.out_features for linear in linears],
        [norm.weight.detach() for norm in norms],
        head_dim,
        getattr(linears[-1], "bits", 0),
        norms[0].eps,
    )
