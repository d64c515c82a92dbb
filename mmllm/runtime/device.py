"""The device to compute on: CUDA, then Apple's MPS, then the CPU."""

from contextlib import AbstractContextManager, nullcontext

import torch

from mmllm.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the best one here. UserError for one that is not here: none takes its place."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        return torch.device(here[0])
    kind, _, index = name.partition(":")
    if kind not in here or (index and not index.isdigit()):
        plan = "; a size, as in cuda:24GB, is for --dry-run" if index.upper().endswith("GB") else ""
        raise UserError(f"device {name!r} is not available here; this machine has {', '.join(here)}{plan}")
    return torch.device(name)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager:
    """Autocast to `half_type` inside the block; nothing when `bf16` is False."""
    return torch.autocast(device.type, half_type(device)) if bf16 else nullcontext()


def half_type(device: torch.device) -> torch.dtype:
    """bfloat16, or float16 on CUDA cards such as T4 and V100, which would emulate bfloat16 slowly."""
    is_emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if is_emulated else torch.bfloat16
