"""Low-rank adapters: W stays frozen, a product of two small matrices B A beside it is trained.

A layer with an adapter is the same object: it gets two parameters, and its `forward` is replaced on the instance. So the
weights of the base keep their names, and any layer that computes W x (float, int8, packed) can have one.

Files are PEFT's. PEFT only warns when the tensors of an adapter fit no layer, and the model then answers as if it had not
been trained; here every tensor of the file must have its layer, or loading fails.

Paper: https://arxiv.org/abs/2106.09685; rank-stabilised scaling: https://arxiv.org/abs/2312.03732; checkpoint format:
https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.config.schema import Amount, Count, Fraction, LoraConfig
from mmllm.errors import CheckpointError, ConfigError
from mmllm.layers.quantized import linear_layers
from mmllm.runtime.files import read_json, refuse_other, typed, write_json
from mmllm.storage.weights import read_safetensors

ALL_LINEAR = "all-linear"
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
AUTO_MAPPING = {  # the class to which peft's AutoPeftModel adds the adapters
    "base_model_class": "LlavaForConditionalGeneration",
    "parent_library": "transformers.models.llava.modeling_llava",
}
ADAPTER = re.compile(r"(?:.*\.)?(layers\.\d+\..+)\.lora_([AB])(?:\.default)?\.weight")
PROJECTOR = re.compile(r"(?:.*\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))")


@dataclass(frozen=True)
class Adapter:
    """What a layer holds of its adapter besides the parameters `lora_A` (r, in) and `lora_B` (out, r)."""

    scaling: float
    dropout: float


def add_adapter_(layer: nn.Module, config: LoraConfig, rng: torch.Generator) -> None:
    """Makes `layer` y = W x + b + scaling B A dropout(x); A is drawn from +-1/sqrt(in), B starts at zero."""
    bound, device = 1 / math.sqrt(layer.in_features), layer.weight.device
    drawn = torch.empty(config.r, layer.in_features).uniform_(-bound, bound, generator=rng)
    layer.lora_A = nn.Parameter(drawn.to(device))
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, config.r, device=device))
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    layer.lora = Adapter(scaling, config.lora_dropout)
    layer.forward = partial(adapted_forward, layer)


def move_adapter_(layer: nn.Module, new: nn.Module) -> None:
    """Gives the adapter of `layer` to `new`, which replaces it."""
    new.lora_A, new.lora_B, new.lora = layer.lora_A, layer.lora_B, layer.lora
    new.forward = partial(adapted_forward, new)


def adapted_forward(layer: nn.Module, x: Tensor) -> Tensor:
    y = type(layer).forward(layer, x)
    low = F.linear(F.dropout(x, layer.lora.dropout, layer.training).to(layer.lora_A.dtype), layer.lora_A)
    return y + (layer.lora.scaling * F.linear(low, layer.lora_B)).to(y.dtype)


# A language model -----------------------------------------------------------------------------------------------------


def has_adapter(layer: nn.Module) -> bool:
    return "lora" in vars(layer)


def adapters(module: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters, by name."""
    return {name: layer for name, layer in module.named_modules() if has_adapter(layer)}


def adapter_names(module: nn.Module) -> set[str]:
    """The names of the adapters' parameters."""
    return {f"{name}.lora_{matrix}" for name in adapters(module) for matrix in "AB"}


def target_layers(language_model: nn.Module, config: LoraConfig) -> list[str]:
    """The linear layers that `target_modules` names, or all but the head; ConfigError for a name that no layer has."""
    linear = list(linear_layers(language_model))
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
    """Gives each of the `target_layers` an adapter, drawn with `seed`."""
    rng = torch.Generator().manual_seed(seed)
    for name in target_layers(language_model, config):
        add_adapter_(language_model.get_submodule(name), config, rng)


@torch.no_grad()
def merge_lora_(module: nn.Module) -> None:
    """Adds scaling B A to W in every layer with an adapter and removes the adapter; ConfigError beside int8 or int4."""
    for layer in adapters(module).values():
        if not isinstance(layer, nn.Linear):
            raise ConfigError("adapters cannot be added to int8 or int4 weights; train beside a float base")
        layer.weight += (layer.lora.scaling * layer.lora_B.float() @ layer.lora_A.float()).to(layer.weight.dtype)
        del layer.lora_A, layer.lora_B, layer.lora, layer.forward


# Files ----------------------------------------------------------------------------------------------------------------


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters and the projector as float32, by the names that PEFT gives them in transformers' LLaVA."""
    tensors = {}
    for name, layer in adapters(model.language_model).items():
        prefix = f"base_model.model.model.language_model.{name.removeprefix('model.')}"
        tensors |= {f"{prefix}.lora_A.weight": layer.lora_A, f"{prefix}.lora_B.weight": layer.lora_B}
    for name, value in model.multi_modal_projector.state_dict().items():
        tensors[f"base_model.model.model.multi_modal_projector.{name}"] = value
    return {name: value.detach().float() for name, value in tensors.items()}


def write_adapter_config(folder: Path, model: nn.Module, config: LoraConfig) -> None:
    modules = sorted({name.rpartition(".")[2] for name in adapters(model.language_model)})
    content = {
        "peft_type": "LORA",
        "task_type": None,  # AutoPeftModel takes the class from auto_mapping
        "base_model_name_or_path": None,  # this folder itself; `mmllm push` writes its name on the hub
        "auto_mapping": AUTO_MAPPING if model.config.features == "patch" else None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        # an expression, because a plain list of names would match the vision tower's layers too
        "target_modules": rf".*language_model\..*\.({'|'.join(modules)})",
        "modules_to_save": ["multi_modal_projector"],
    }
    write_json(folder / CONFIG_FILE, content)


@dataclass(frozen=True)
class _AdapterFields:
    """What adapter_config.json holds, with PEFT's defaults."""

    peft_type: Literal["LORA"]
    r: Count
    lora_alpha: Amount = 8
    lora_dropout: Fraction = 0.0
    use_rslora: bool = False


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Tensor]]:
    """A PEFT adapter for Qwen2 or LLaVA: its configuration, its tensors as `LAYER.lora_A`, and those of the projector.

    CheckpointError names a setting or a tensor that this model cannot have.
    """
    file = folder / CONFIG_FILE
    content = read_json(file)
    supported = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "fan_in_fan_out": False}
    refuse_other(content, supported, file)
    settings = typed(_AdapterFields, content, file)
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
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=tuple(modules),
        use_rslora=settings.use_rslora,
    )
    return config, lora, projector


def load_adapter_(model: nn.Module, folder: Path) -> LoraConfig:
    """Adds the adapters in `folder` to `model`, and the projector if the file has one; returns their configuration."""
    config, lora, projector = read_adapter(folder)
    add_lora_(model.language_model, config)
    wanted = {name: model.language_model.get_parameter(name) for name in adapter_names(model.language_model)}
    wanted |= {f"projector {n}": p for n, p in model.multi_modal_projector.named_parameters() if projector}
    tensors = lora | {f"projector {name}": value for name, value in projector.items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        have, want = (list(group[name].shape) if name in group else None for group in (tensors, wanted))
        if have != want:
            reason = (
                f"is {have}, but {want} is needed" if have and want else "is missing" if want else "has no layer here"
            )
            raise CheckpointError(f"{folder / TENSOR_FILE}: {name} {reason}")
        wanted[name].data.copy_(tensors[name])
    return config
