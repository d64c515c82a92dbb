"""Low-rank adapters: W stays as it is, B A beside it learns.

The surprising fact: an adapter that fits no module is no error to the library that everyone uses. It warns, and the model
answers as if it had never been trained. So here every tensor of an adapter file must find its place.

A layer with an adapter is the same layer: it gets two parameters, and its `forward` is replaced on the instance. So base
weights keep their names, and whatever the layer is made of (int8, see quant.py) stays.

Paper: https://arxiv.org/abs/2106.09685; rank-stabilised scaling:
https://arxiv.org/abs/2312.03732; files: https://huggingface.co/docs/peft (checkpoint format).
Next: model.py, trainer.py.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.config.schema import LoraConfig
from mmllm.errors import CheckpointError, ConfigError
from mmllm.layers.quantized import FrozenLinear
from mmllm.runtime.files import read_json
from mmllm.storage.weights import read_safetensors

ALL_LINEAR = "all-linear"
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = re.compile(r"(?:.*\.)?(layers\.\d+\..+)\.lora_([AB])(?:\.default)?\.weight")
PROJECTOR = re.compile(r"(?:.*\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))")


@dataclass
class Adapter:
    """What a layer knows of its adapter besides `lora_A` and `lora_B`."""

    scaling: float
    dropout: float
    is_merged: bool = False


def adapt_(layer: nn.Module, config: LoraConfig, rng: torch.Generator) -> None:
    """Makes `layer` y = W x + b + scaling B A dropout(x); A is drawn from +-1/sqrt(in), B begins at zero."""
    bound, device = 1 / math.sqrt(layer.in_features), layer.weight.device
    drawn = torch.empty(config.r, layer.in_features).uniform_(-bound, bound, generator=rng)
    layer.lora_A = nn.Parameter(drawn.to(device))
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, config.r, device=device))
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    layer.lora = Adapter(scaling, config.lora_dropout)
    layer.forward = partial(adapted, layer)


def move_adapter_(layer: nn.Module, new: nn.Module) -> None:
    """Gives the adapter of `layer` to the layer that takes its place."""
    new.lora_A, new.lora_B, new.lora = layer.lora_A, layer.lora_B, layer.lora
    new.forward = partial(adapted, new)


def adapted(layer: nn.Module, x: Tensor) -> Tensor:
    y = type(layer).forward(layer, x)
    if layer.lora.is_merged:
        return y
    low = F.linear(F.dropout(x, layer.lora.dropout, layer.training).to(layer.lora_A.dtype), layer.lora_A)
    return y + (layer.lora.scaling * F.linear(low, layer.lora_B)).to(y.dtype)


@torch.no_grad()
def merge_(layer: nn.Module, sign: int = 1) -> None:
    """Adds B A to W; with `sign` -1 takes it out again, up to rounding."""
    if layer.lora.is_merged == (sign == 1):
        raise ValueError(f"the adapter is {'already' if layer.lora.is_merged else 'not'} merged")
    if not isinstance(layer, nn.Linear):
        raise ConfigError("adapters cannot be added to int8 or int4 weights; train beside a float base")
    layer.weight += (sign * layer.lora.scaling * layer.lora_B.float() @ layer.lora_A.float()).to(layer.weight.dtype)
    layer.lora.is_merged = sign == 1


def adapters(module: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}


def target_layers(language_model: nn.Module, config: LoraConfig) -> list[str]:
    """The linear layers that `target_modules` names (or all but the head); ConfigError when it names one that is none."""
    linear = [
        n
        for n, layer in language_model.named_modules()
        if isinstance(layer, nn.Linear | FrozenLinear) and n != "lm_head"
    ]
    targets = set(config.target_modules)
    chosen = [name for name in linear if targets == {ALL_LINEAR} or name.rpartition(".")[2] in targets]
    unknown = targets - {name.rpartition(".")[2] for name in chosen} - {ALL_LINEAR}
    if unknown or not chosen:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ConfigError(
            f"model.lora_config.target_modules: no layer {', '.join(sorted(unknown or targets))}; there are {there}"
        )
    return chosen


def add_lora_(language_model: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """Gives each of the `target_layers` an adapter, drawn by `seed`."""
    rng = torch.Generator().manual_seed(seed)
    for name in target_layers(language_model, config):
        adapt_(language_model.get_submodule(name), config, rng)


def merge_lora_(module: nn.Module) -> None:
    """Adds all adapters to their weights: as fast as a model without, and again one after `unmerge_lora_`."""
    for layer in adapters(module).values():
        merge_(layer)


def unmerge_lora_(module: nn.Module) -> None:
    for layer in adapters(module).values():
        merge_(layer, sign=-1)


def fold_lora_(module: nn.Module) -> None:
    """Adds all adapters to their weights for good: layers as they were before are left."""
    for layer in adapters(module).values():
        merge_(layer)
        del layer.lora_A, layer.lora_B, layer.lora, layer.forward


# Files ----------------------------------------------------------------------------------------------------------------


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters and the projector by the names that PEFT has for them in transformers' LLaVA, float32."""
    tensors = {}
    for name, layer in adapters(model.language_model).items():
        place = f"base_model.model.model.language_model.{name.removeprefix('model.')}"
        tensors |= {f"{place}.lora_A.weight": layer.lora_A, f"{place}.lora_B.weight": layer.lora_B}
    for name, value in model.multi_modal_projector.state_dict().items():
        tensors[f"base_model.model.model.multi_modal_projector.{name}"] = value
    return {name: value.detach().float() for name, value in tensors.items()}


def write_adapter_config(folder: Path, model: nn.Module, config: LoraConfig) -> None:
    modules = sorted({name.rpartition(".")[2] for name in adapters(model.language_model)})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        # by expression: a plain list of names would mean the vision tower's layers too
        "target_modules": rf".*language_model\..*\.({'|'.join(modules)})",
        "modules_to_save": ["multi_modal_projector"],
    }
    (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Tensor]]:
    """An adapter of PEFT for Qwen2 or LLaVA: its configuration, the tensors by `LAYER.lora_A` and those of the projector.

    CheckpointError names what this model could not follow.
    """
    file = folder / CONFIG_FILE
    about = read_json(file)
    refused = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "fan_in_fan_out": False}
    if about.get("peft_type") != "LORA" or "r" not in about:
        raise CheckpointError(f"{file}: not a LoRA adapter; it needs peft_type LORA and r")
    for name, only in refused.items():
        if (about.get(name) or only) != only:
            raise CheckpointError(f"{file}: {name} is {about[name]!r}; only {only!r} is supported")
    lora, projector = {}, {}
    for name, value in read_safetensors(folder / TENSOR_FILE).items():
        if "vision_tower" not in name and (found := ADAPTER.fullmatch(name)):
            lora[f"model.{found[1]}.lora_{found[2]}"] = value
        elif found := PROJECTOR.fullmatch(name):
            projector[found[1]] = value
        else:
            raise CheckpointError(f"{folder / TENSOR_FILE}: {name} belongs to no layer that can have an adapter")
    modules = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in lora})
    if not modules:
        raise CheckpointError(f"{folder / TENSOR_FILE}: holds no adapter")
    config = LoraConfig(
        r=about["r"],
        lora_alpha=about.get("lora_alpha") or 8,  # PEFT's default
        lora_dropout=float(about.get("lora_dropout") or 0.0),
        target_modules=tuple(modules),
        use_rslora=bool(about.get("use_rslora")),
    )
    return config, lora, projector


def load_adapter_(model: nn.Module, folder: Path) -> LoraConfig:
    """Adds the adapters in `folder` to `model`, with the projector where it has one; returns their configuration."""
    config, lora, projector = read_adapter(folder)
    add_lora_(model.language_model, config)
    places = {n: p for n, p in model.language_model.named_parameters() if ".lora_" in n}
    places |= {f"projector {n}": p for n, p in model.multi_modal_projector.named_parameters() if projector}
    tensors = lora | {f"projector {name}": value for name, value in projector.items()}
    for name in sorted(places.keys() | tensors.keys()):
        have, want = (list(group[name].shape) if name in group else None for group in (tensors, places))
        if have != want:
            what = (
                f"is {have}, but {want} is needed" if have and want else "is missing" if want else "has no layer here"
            )
            raise CheckpointError(f"{folder / TENSOR_FILE}: {name} {what}")
        places[name].data.copy_(tensors[name])
    return config
