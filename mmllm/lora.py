"""Low-rank adapters: W stays as it is, B A beside it learns.

The surprising fact: an adapter that fits no module is no error to the library that everyone uses. It warns, and the model
answers as if it had never been trained. So here every tensor of an adapter file must find its place.

A layer with adapters is still an `nn.Linear` with its `weight` and `bias` in their old names, so base checkpoints load
with adapters and without. Paper: https://arxiv.org/abs/2106.09685; rank-stabilised scaling:
https://arxiv.org/abs/2312.03732; files: https://huggingface.co/docs/peft (checkpoint format).
Next: model.py, trainer.py.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mmllm.config import LoraConfig
from mmllm.errors import CheckpointError, ConfigError
from mmllm.weights import read_json, read_safetensors

ALL_LINEAR = "all-linear"
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = re.compile(r"(?:.*\.)?(layers\.\d+\..+)\.lora_([AB])(?:\.default)?\.weight")
PROJECTOR = re.compile(r"(?:.*\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))")


class LoRALinear(nn.Linear):
    """y = W x + b + scaling B A dropout(x); A is drawn from +-1/sqrt(in), B begins at zero."""

    def __init__(self, base: nn.Linear, config: LoraConfig, chance: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        bound, device = 1 / math.sqrt(base.in_features), base.weight.device
        drawn = torch.empty(config.r, base.in_features).uniform_(-bound, bound, generator=chance)
        self.lora_A = nn.Parameter(drawn.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device))
        self.scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.dropout = config.lora_dropout
        self.is_merged = False

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.is_merged:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return y + (self.scaling * F.linear(low, self.lora_B)).to(y.dtype)

    @torch.no_grad()
    def merge_(self, sign: int = 1) -> None:
        """Adds B A to W; with `sign` -1 takes it out again, up to rounding."""
        if self.is_merged == (sign == 1):
            raise ValueError(f"the adapter is {'already' if self.is_merged else 'not'} merged")
        self.weight += (sign * self.scaling * self.lora_B.float() @ self.lora_A.float()).to(self.weight.dtype)
        self.is_merged = sign == 1


def adapters(module: nn.Module) -> dict[str, LoRALinear]:
    """The layers with adapters, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def target_layers(language_model: nn.Module, config: LoraConfig) -> list[str]:
    """The linear layers that `target_modules` names (or all but the head); ConfigError when it names one that is none."""
    linear = [n for n, layer in language_model.named_modules() if isinstance(layer, nn.Linear) and n != "lm_head"]
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
    chance = torch.Generator().manual_seed(seed)
    for name in target_layers(language_model, config):
        replace_(language_model, name, LoRALinear(language_model.get_submodule(name), config, chance))


def replace_(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)


def merge_lora_(module: nn.Module) -> None:
    """Adds all adapters to their weights: as fast as a model without, and again one after `unmerge_lora_`."""
    for layer in adapters(module).values():
        layer.merge_()


def unmerge_lora_(module: nn.Module) -> None:
    for layer in adapters(module).values():
        layer.merge_(sign=-1)


def fold_lora_(module: nn.Module) -> None:
    """Adds all adapters to their weights for good: plain linear layers are left."""
    for name, layer in adapters(module).items():
        layer.merge_()
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        replace_(module, name, plain)


# Files ----------------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, model: nn.Module, config: LoraConfig) -> None:
    """Writes the adapters and the projector as PEFT reads them, for transformers' LLaVA."""
    tensors = {}
    for name, layer in adapters(model.language_model).items():
        place = f"base_model.model.model.language_model.{name.removeprefix('model.')}"
        tensors |= {f"{place}.lora_A.weight": layer.lora_A, f"{place}.lora_B.weight": layer.lora_B}
    for name, value in model.multi_modal_projector.state_dict().items():
        tensors[f"base_model.model.model.multi_modal_projector.{name}"] = value
    save_file({n: v.detach().float().contiguous() for n, v in tensors.items()}, folder / TENSOR_FILE, {"format": "pt"})
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
